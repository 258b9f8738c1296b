"""Files and folders appear whole or not at all, and everything beside them stays."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from recurrentgemma.common.errors import DestinationError, DiskSpaceError
from recurrentgemma.common.io.files import destination_path, whole_file, whole_folder

RANDOM = "k3v_x9qa"  # as tempfile makes them


def write(
    path: Path,
    text: str = "new",
    *,
    force: bool = False,
    meanwhile: Callable[[Path], object] = lambda path: None,
) -> None:
    with whole_folder(path, force=force) as folder:
        (folder / "file").write_text(text)
        meanwhile(path)


def folder_with(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text(text)
    return path


def tree(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("appears", ["file", "folder"])
def test_a_destination_that_appears_in_the_meantime_stays(tmp_path: Path, appears: str) -> None:
    def appear(path: Path) -> None:
        if appears == "folder":
            folder_with(path, "another's")
        else:
            path.write_text("another's")

    def write_file() -> None:
        with whole_file(tmp_path / "one") as file:
            file.write_text("new")
            appear(tmp_path / "one")

    with pytest.raises(DestinationError, match="appeared in the meantime"):
        write(tmp_path / "out", meanwhile=appear)
    with pytest.raises(DestinationError, match="exists"):
        write_file()
    assert len(tree(tmp_path)) == 2
    assert set(tree(tmp_path).values()) == {"another's"}
    write(tmp_path / "out", force=True)
    assert tree(tmp_path / "out") == {"file": "new"}


@pytest.mark.parametrize("name", ["out/../out", "./out", "link/../out", "out/."])
def test_a_destination_under_another_name(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder_with(Path("out"), "old")
    folder_with(Path("elsewhere/deep"), "other")
    Path("link").symlink_to("out")
    with pytest.raises(DestinationError, match="exists"):
        write(Path(name))
    write(Path(name), force=True)
    assert tree(tmp_path) == {"out/file": "new", "elsewhere/deep/file": "other"}


def test_links_are_followed_except_in_the_last_part(tmp_path: Path) -> None:
    folder_with(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    assert destination_path(tmp_path / "link") == tmp_path / "link"
    assert destination_path(tmp_path / "link" / "new") == tmp_path / "real" / "new"
    write(tmp_path / "link", force=True)  # replaces the link, not its target
    assert tree(tmp_path) == {"real/file": "old", "link/file": "new"}


def test_an_unknown_user_is_a_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("~no such user"))
    assert tree(tmp_path) == {"~no such user/file": "new"}


def test_the_next_writer_restores_what_a_killed_process_replaced(tmp_path: Path) -> None:
    folder_with(tmp_path / f".out.{RANDOM}.replaced", "old")
    folder_with(tmp_path / f".out.{RANDOM}.partial", "half")
    with pytest.raises(DestinationError, match="exists"):
        write(tmp_path / "out")
    assert tree(tmp_path) == {"out/file": "old"}


def test_the_next_writer_removes_the_rest_of_a_replacement(tmp_path: Path) -> None:
    folder_with(tmp_path / "out", "new")
    folder_with(tmp_path / f".out.{RANDOM}.replaced", "old")
    write(tmp_path / "out", "newer", force=True)
    assert tree(tmp_path) == {"out/file": "newer"}


@pytest.mark.parametrize(
    "name",
    [
        f".out.v2.{RANDOM}.replaced",  # made for a folder "out.v2"
        f".out.v2.{RANDOM}.partial",
        ".out.mine.replaced",
        f"out.{RANDOM}.replaced",
        f".another.{RANDOM}.replaced",
    ],
)
def test_siblings_of_others_are_left_alone(tmp_path: Path, name: str) -> None:
    folder_with(tmp_path / name, "theirs")
    write(tmp_path / "out")
    write(tmp_path / "out", force=True)
    assert tree(tmp_path) == {f"{name}/file": "theirs", "out/file": "new"}


def test_a_failure_removes_the_parents_it_made(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    out = tmp_path / "there" / "deep" / "new" / "out"
    with pytest.raises(RuntimeError, match="half way"), whole_folder(out):
        raise RuntimeError("half way")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "folder")
        with whole_file(tmp_path / "file") as file:
            file.write_text("private")
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("folder", "file")]
    assert modes == [0o750, 0o640]


def test_a_failed_replacement_restores_the_old_folder(tmp_path: Path, monkeypatch) -> None:
    folder_with(tmp_path / "out", "old")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise PermissionError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError, match="no"):
        write(tmp_path / "out", force=True)
    assert tree(tmp_path) == {"out/file": "old"}


@pytest.mark.parametrize("moment", ["the old goes", "the new comes"])
def test_two_processes_replace_one_folder(tmp_path: Path, monkeypatch, moment: str) -> None:
    out = folder_with(tmp_path / "out", "old")
    rename = Path.rename

    def raced(path: Path, target: Path) -> Path:
        if moment == "the old goes" and path == out:
            monkeypatch.undo()
            shutil.rmtree(out)
        if moment == "the new comes" and target == out:
            monkeypatch.undo()
            folder_with(out, "another's")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", raced)
    write(out, force=True)
    assert tree(tmp_path) == {"out/file": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_just_made_is_not_cleared_by_another_process(tmp_path: Path, monkeypatch) -> None:
    make = tempfile.mkdtemp

    def raced(**kwargs: str) -> str:
        made = make(**kwargs)
        monkeypatch.undo()
        write(tmp_path / "out", "another's")
        return made

    monkeypatch.setattr(tempfile, "mkdtemp", raced)
    write(tmp_path / "out", force=True)
    assert tree(tmp_path) == {"out/file": "new"}


def test_the_next_writer_removes_an_empty_folder(tmp_path: Path, monkeypatch) -> None:
    make = tempfile.mkdtemp

    def killed(**kwargs: str) -> str:
        make(**kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "mkdtemp", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    write(tmp_path / "out")
    assert tree(tmp_path) == {"out/file": "new"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="locks of folders are POSIX's")
@pytest.mark.parametrize("whole", ["whole_file", "whole_folder"])
def test_the_next_writer_removes_what_a_killed_process_was_writing(
    tmp_path: Path, whole: str
) -> None:
    code = (
        "import os, signal, sys; from recurrentgemma.common.io import files\n"
        "with getattr(files, sys.argv[1])(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, whole, str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    with whole_file(tmp_path / "out") as file:
        file.write_text("new")
    assert tree(tmp_path) == {"out": "new"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "became full"),
        (errno.EDQUOT, "gives this user no more room"),
        (errno.EFBIG, "takes no file so large"),
    ],
)
def test_disks_with_too_little_room(tmp_path: Path, number: int, words: str) -> None:
    expected = pytest.raises(DiskSpaceError, match=f"the disk of .*out {words}")
    with expected, whole_folder(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_devices_and_pipes_are_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for whole in (whole_file, whole_folder):
        with (
            pytest.raises(DestinationError, match="is a device, a pipe or a socket"),
            whole(pipe, force=True),
        ):
            raise AssertionError
        assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]
    link = tmp_path / "link"
    link.symlink_to(os.devnull)  # the link is replaced
    with whole_file(link, force=True) as file:
        file.write_text("new")
    assert (link.is_symlink(), link.read_text()) == (False, "new")
