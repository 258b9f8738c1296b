"""What the tests of conversion share."""

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import write_checkpoint

from recurrentgemma_conversion.formats import Format

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
