"""What the tests of conversion share."""

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import files, write_checkpoint

from recurrentgemma.common import errors
from recurrentgemma_conversion import Format, convert

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Makes a checkpoint under a name in the test's own folder."""

    def write(name: str, format_: Format, *args, **kwargs) -> Path:
        return write_checkpoint(tmp_path / name, format_, *args, **kwargs)

    return write


@pytest.fixture
def golden() -> Path:
    """What the published implementations wrote, where it is there."""
    if not GOLDEN.is_dir():
        pytest.skip("there is no golden data beside the project")
    return GOLDEN


@pytest.fixture
def refused(tmp_path: Path):
    """Converts, and expects an error that contains all the words and leaves nothing behind."""

    def run(source: Path, error: type[errors.CheckpointError], *words: str, **kwargs) -> None:
        before = files(source) if source.is_dir() else {}
        names = set(tmp_path.rglob("*"))
        to = kwargs.pop("to", Format.RECURRENTGEMMA)
        with pytest.raises(errors.CheckpointError) as caught:
            convert(source, tmp_path / "out", to, **kwargs)
        assert type(caught.value) is error
        for word in words:
            assert word in str(caught.value)
        assert set(tmp_path.rglob("*")) == names
        assert not source.is_dir() or files(source) == before

    return run
