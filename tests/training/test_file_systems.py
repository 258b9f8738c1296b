"""File systems that lack links, locks, modes or flushing: network drives, exFAT, FUSE."""

import errno
import os
import stat

import pytest
from checkpoints import write_checkpoint

from recurrentgemma.cli import main
from recurrentgemma.common.io import files
from recurrentgemma_conversion import Format, open_checkpoint


def failing(number: int, call=None, when=lambda *args: True):
    """A system call that fails as on such a file system."""

    def run(*args, **kwargs):
        if when(*args):
            raise OSError(number, os.strerror(number))
        assert call is not None
        return call(*args, **kwargs)

    return run


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@pytest.fixture(
    params=["links", "links, by name", "flushing folders", "flushing", "locks", "modes"]
)
def lacking(request, monkeypatch) -> str:
    match request.param:
        case "links":
            monkeypatch.setattr(os, "symlink", failing(errno.EPERM))
        case "links, by name":
            monkeypatch.setattr(os, "symlink", failing(errno.ENOTSUP))
        case "flushing folders":
            monkeypatch.setattr(os, "fsync", failing(errno.EINVAL, os.fsync, is_folder))
        case "flushing":
            monkeypatch.setattr(os, "fsync", failing(errno.ENOTSUP))
        case "locks":
            if files.fcntl is None:
                pytest.skip("this system has no locks")
            monkeypatch.setattr(files.fcntl, "flock", failing(errno.ENOLCK))
        case "modes":
            monkeypatch.setattr(os, "chmod", failing(errno.EPERM))
    return request.param


def test_a_run_with_validation_and_its_resumption(lacking: str, corpus, train) -> None:
    pytest.importorskip("torch.nn")
    options = {"checkpoint_every": 1, "evaluate_every": 1}
    assert train(steps=2, **options).code == 0
    run = corpus / "run"
    with open_checkpoint(run / "best") as best:
        assert best.path.resolve().parent == (run / "checkpoints").resolve()
    assert (run / "best").is_symlink() == (not lacking.startswith("links"))
    if lacking.startswith("links"):
        assert (run / "best").read_text().startswith("checkpoints")
    assert train(steps=2, force=True, **options).code == 0
    (run / "model").rename(corpus / "model before")
    assert train(steps=2, resume=True, **options).code == 0
    for path in (run, run / "best", run / "model"):
        assert main(["inspect", str(path), "--json"]) == 0


def test_all_commands_that_write(lacking: str, tmp_path, capsys) -> None:
    pytest.importorskip("torch.nn")
    source, prompts = tmp_path / "source", tmp_path / "prompts"
    write_checkpoint(source, Format.HUGGINGFACE)
    prompts.write_text('"It was"\n')
    ours = str(tmp_path / "ours")

    def run(*args: object) -> None:
        assert main([*map(str, args)]) == 0, capsys.readouterr().err

    run("convert", source, ours, "--to", "recurrentgemma")
    run("convert", source, ours, "--to", "recurrentgemma", "--force")
    sample = ("sample", "--checkpoint", ours, "--framework", "torch", "--max-new-tokens", 2)
    for _ in range(2):
        run(*sample, "--input", prompts, "--output", tmp_path / "results")
    for force in ((), ("--force",)):
        run(*sample, "It", "--save-state", tmp_path / "state", *force)
    run(*sample, "--load-state", tmp_path / "state")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
