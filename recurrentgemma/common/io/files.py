"""Folders that appear whole or not at all, and room for them on the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from recurrentgemma.common.errors import DestinationError, DiskSpaceError

try:
    import fcntl
except ImportError:  # Windows: what a killed process left behind stays there
    fcntl = None

_SPARE = 16 << 20  # bytes, for all that is not tensors
_PARTIAL, _OLD = ".partial", ".replaced"  # endings of what is written, and of what it replaces
# What a disk with too little room does, by the number of the error.
NO_ROOM = {
    errno.ENOSPC: "became full",
    errno.EDQUOT: "gives this user no more room",
    errno.EFBIG: "takes no file so large",
}


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path as a shell has it: `~` is the home, unless there is no such user."""
    return Path(os.path.expanduser(path))


def destination_path(path: str | os.PathLike[str]) -> Path:
    """The absolute name of what is to be written: links in it followed, but for the last part."""
    path = expanded(path)
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


@contextlib.contextmanager
def whole_folder(
    path: str | os.PathLike[str], *, force: bool = False, size: int = 0
) -> Iterator[Path]:
    """A temporary sibling to write to; once the block ends well it takes the name `path`.

    All of it is on the disk by then.

    A process killed in between leaves a hidden sibling, which the next writer of `path` removes.

    Args:
      path: The folder to make.
      force: Whether to replace what is at `path`.
      size: Bytes that will be written.

    Raises:
      DestinationError: `path` exists, or comes to exist meanwhile, and `force` is not set, or it
        is a device, or its parent is no folder.
      DiskSpaceError: There is no room for `size` bytes, or no longer.
    """
    folder = destination_path(path)
    with scratch_folder(folder) as temporary:
        _require_free(folder, force)
        require_room(folder.parent, size)
        try:
            yield temporary
            flush(temporary)
            temporary.chmod(0o777 & ~_umask())
            _rename(temporary, folder, force)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise no_room(folder, error) from error
            raise


@contextlib.contextmanager
def scratch_folder(path: Path, *, parents: bool = True) -> Iterator[Path]:
    """A hidden sibling of a path, there until the block ends.

    One that a killed process left goes with the next that is made for the same path.

    Args:
      path: The path.
      parents: Whether to make the folders above it.

    Raises:
      DestinationError: The parent of `path` is no folder, or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            if parents:
                stack.enter_context(_made(path.parent))
            _recover(path)
            temporary = stack.enter_context(_locked_sibling(path))
        except OSError as error:
            raise DestinationError(f"cannot write {path}: {error.strerror}") from error
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        yield temporary


@contextlib.contextmanager
def _locked_sibling(path: Path) -> Iterator[Path]:
    """A new hidden folder; another if one is cleared, as left behind, before it is locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent))
        with locked(folder) as free:
            if free is not False and folder.exists():
                yield folder
                return


@contextlib.contextmanager
def held_folder(path: Path) -> Iterator[None]:
    """Makes a folder, if there is none, which no other process can hold until the block ends.

    If the block fails and nothing is in what was made, it goes again.

    Raises:
      DestinationError: Another process holds it, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_made(path))
        except OSError as error:
            raise DestinationError(f"cannot write {path}: {error.strerror}") from error
        if stack.enter_context(locked(path)) is False:
            raise DestinationError(f"another process is writing {path}")
        yield


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder and those above; what was made goes again if the block fails, where empty."""
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _umask() -> int:
    mask = os.umask(0o077)  # which can only be read by being set
    os.umask(mask)
    return mask


def _require_free(path: Path, force: bool) -> None:
    if not force and os.path.lexists(path):
        raise DestinationError(f"{path} exists; pass force=True to replace it")
    require_replaceable(path)


def require_replaceable(path: Path) -> None:
    """Raises `DestinationError` if a path is a device, a pipe or a socket, which are not files."""
    if os.path.lexists(path) and not (path.is_symlink() or path.is_file() or path.is_dir()):
        raise DestinationError(f"{path} is a device, a pipe or a socket: nothing may replace it")


def flush(folder: Path) -> None:
    """Puts all that is in a folder on the disk."""
    for directory, _, files in os.walk(folder):
        for name in (*files, "."):
            _sync(Path(directory) / name)


def require_room(folder: Path, size: int) -> None:
    """Raises `DiskSpaceError` if the disk of a folder has no room for this many bytes."""
    free = shutil.disk_usage(folder).free
    if size and free < size + _SPARE:
        raise DiskSpaceError(
            f"too little room in {folder}: {(size + _SPARE) / 1e9:.2f} GB are needed, "
            f"{free / 1e9:.2f} GB are free"
        )


def no_room(path: Path, error: OSError) -> DiskSpaceError:
    """What to raise when a write to a path failed with an error of `NO_ROOM`."""
    return DiskSpaceError(f"the disk of {path} {NO_ROOM[error.errno or errno.ENOSPC]}")


def _rename(temporary: Path, folder: Path, force: bool) -> None:
    old = temporary.with_suffix(_OLD)
    while temporary.exists():
        if force:
            with contextlib.suppress(FileNotFoundError):  # there is none, or no longer
                folder.rename(old)
        try:
            temporary.rename(folder)  # which replaces nothing but an empty folder
        except OSError as error:
            if not os.path.lexists(folder):
                if os.path.lexists(old):
                    old.rename(folder)
                raise
            if not force:
                message = f"{folder} came to exist meanwhile; it is as it was"
                raise DestinationError(message) from error
        _remove(old)  # once more where another process has put its own there meanwhile
    _sync(folder.parent)


def _remove(path: Path) -> None:
    """Removes what has been replaced; what cannot be now is, by the next writer."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Puts a file, or the names in a folder, on the disk, where folders can be opened."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool | None]:
    """Holds the lock that says that a process writes this path; whether it was free, if known."""
    free = None
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            try:
                descriptor = os.open(path, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
            except BlockingIOError:
                free = False
            except OSError:  # it is another user's, or gone, or its disk has no locks
                pass
        yield free


def _recover(folder: Path) -> None:
    """Clears what a killed process left: what it replaced comes back, what it wrote goes."""
    for path in _siblings(folder.parent, _OLD, folder.name):
        partial = path.with_suffix(_PARTIAL)
        if partial.exists():
            with locked(partial) as free:
                if not free:
                    continue  # another process is between its two steps
        if os.path.lexists(folder):
            _remove(path)
        else:
            with contextlib.suppress(OSError):  # another process was sooner
                path.rename(folder)
    remove_partial(folder.parent, folder.name)


def remove_partial(parent: Path, name: str | None = None) -> None:
    """Removes the temporary siblings, in a folder, that no process is writing any more.

    Args:
      parent: The folder.
      name: What they were to become; anything if None.
    """
    for path in _siblings(parent, _PARTIAL, name):
        if path.is_dir() and not path.is_symlink():
            with locked(path) as free:
                if free:
                    shutil.rmtree(path, ignore_errors=True)
        elif name is None:
            path.unlink(missing_ok=True)


def _siblings(parent: Path, suffix: str, name: str | None) -> list[Path]:
    """What was made in a folder for a name, or for any, with this ending."""
    stem = ".+" if name is None else rf"{re.escape(name)}\.[a-z0-9_]{{8}}"
    pattern = re.compile(rf"\.{stem}{re.escape(suffix)}", re.DOTALL)
    return [path for path in parent.iterdir() if pattern.fullmatch(path.name)]


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """A temporary file to write to; once the block ends well it takes the name `path`.

    A process killed in between leaves a hidden sibling, which the next writer of `path` removes.

    Args:
      path: The file to make.
      force: Whether to replace what is at `path`.

    Raises:
      DestinationError: `path` exists, or comes to exist meanwhile, and `force` is not set, or it
        cannot be written.
    """
    target = destination_path(path)
    _require_free(target, force)
    with scratch_folder(target, parents=False) as folder:
        temporary = folder / target.name
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            _require_free(target, force)
            temporary.replace(target)
        except OSError as error:
            raise DestinationError(f"cannot write {target}: {error.strerror}") from error
