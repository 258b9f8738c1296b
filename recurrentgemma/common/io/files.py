"""Files and folders that appear whole or not at all, and room for them on the disk."""

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
except ImportError:  # Windows: the leftovers of a killed process stay there
    fcntl = None

# What a file system says that lacks an operation: a network drive, exFAT, FUSE.
_LACKING = {
    errno.EACCES,
    errno.EBADF,
    errno.EINVAL,
    errno.EISDIR,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EPERM,
}
_SPARE = 16 << 20  # bytes for everything that is not a tensor
_PARTIAL, _OLD = ".partial", ".replaced"  # suffixes of what is being written and being replaced
# What happened to a disk, by the number of the error.
NO_ROOM = {
    errno.ENOSPC: "became full",
    errno.EDQUOT: "gives this user no more room",
    errno.EFBIG: "takes no file so large",
}


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path as a shell reads it: `~` is the home folder, unless there is no such user."""
    return Path(os.path.expanduser(path))


def destination_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a destination; links are followed, except in its last part."""
    path = expanded(path)
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


@contextlib.contextmanager
def whole_folder(
    path: str | os.PathLike[str], *, force: bool = False, size: int = 0
) -> Iterator[Path]:
    """A temporary folder, flushed to the disk and renamed to `path` when the block succeeds.

    A killed process leaves a hidden sibling; the next writer of `path` removes it.

    Args:
      path: The folder to make.
      force: Whether to replace what is at `path`.
      size: The number of bytes that the block will write.

    Raises:
      DestinationError: `path` exists, or appears during the block, and `force` is not set; or it
        is a device, or its parent is not a folder.
      DiskSpaceError: The disk has no room for `size` bytes, or becomes full.
    """
    folder = destination_path(path)
    with scratch_folder(folder) as temporary:
        _require_free(folder, force)
        require_room(folder.parent, size)
        try:
            yield temporary
            flush(temporary)
            with where_supported():
                temporary.chmod(0o777 & ~_umask())
            _rename(temporary, folder, force)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise no_room(folder, error) from error
            raise


@contextlib.contextmanager
def scratch_folder(path: Path, *, parents: bool = True) -> Iterator[Path]:
    """A hidden folder beside a path, which exists until the block ends.

    A killed process leaves it; the next call for the same path removes it.

    Args:
      path: The path.
      parents: Whether to make the folders above it.

    Raises:
      DestinationError: The parent of `path` is not a folder, or cannot be written.
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
    """A new hidden folder; a second one if another process clears the first before its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent))
        with locked(folder) as free:
            if free is not False and folder.exists():
                yield folder
                return


@contextlib.contextmanager
def held_folder(path: Path) -> Iterator[None]:
    """Makes a folder unless it exists, and keeps other processes from holding it in the block.

    If the block fails, the folders that it made are removed where they are empty.

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
    """Makes a folder and its parents; if the block fails, the new ones go where they are empty."""
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
    mask = os.umask(0o077)  # it can be read only by setting it
    os.umask(mask)
    return mask


def _require_free(path: Path, force: bool) -> None:
    if not force and os.path.lexists(path):
        raise DestinationError(f"{path} exists; pass force=True to replace it")
    require_replaceable(path)


def require_replaceable(path: Path) -> None:
    """Raises `DestinationError` if a path is a device, a pipe or a socket."""
    if os.path.lexists(path) and not (path.is_symlink() or path.is_file() or path.is_dir()):
        raise DestinationError(f"{path} is a device, a pipe or a socket: nothing may replace it")


def flush(folder: Path) -> None:
    """Flushes the contents of a folder to the disk."""
    for directory, _, files in os.walk(folder):
        for name in (*files, "."):
            _sync(Path(directory) / name)


def require_room(folder: Path, size: int) -> None:
    """Raises `DiskSpaceError` if the disk of a folder has no room for `size` bytes."""
    free = shutil.disk_usage(folder).free
    if size and free < size + _SPARE:
        raise DiskSpaceError(
            f"too little room in {folder}: {(size + _SPARE) / 1e9:.2f} GB are needed, "
            f"{free / 1e9:.2f} GB are free"
        )


def no_room(path: Path, error: OSError) -> DiskSpaceError:
    """The error to raise when a write to a path failed with one of `NO_ROOM`."""
    return DiskSpaceError(f"the disk of {path} {NO_ROOM[error.errno or errno.ENOSPC]}")


def _rename(temporary: Path, folder: Path, force: bool) -> None:
    old = temporary.with_suffix(_OLD)
    while temporary.exists():
        if force:
            with contextlib.suppress(FileNotFoundError):  # nothing is there
                folder.rename(old)
        try:
            temporary.rename(folder)  # replaces nothing except an empty folder
        except OSError as error:
            if not os.path.lexists(folder):
                if os.path.lexists(old):
                    old.rename(folder)
                raise
            if not force:
                message = f"{folder} appeared in the meantime; it was not changed"
                raise DestinationError(message) from error
        _remove(old)  # the loop runs again if another process put its own folder there
    _sync(folder.parent)


def _remove(path: Path) -> None:
    """Removes what was replaced; the next writer removes what cannot be removed now."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk, where the file system does that."""
    with where_supported():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def where_supported() -> Iterator[None]:
    """Leaves out an operation that not every file system has: modes, links, flushing."""
    try:
        yield
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in _LACKING:
            raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool | None]:
    """Holds the lock of a path's writer; yields whether it was free, or None if unknown."""
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
            except OSError:  # another user owns it, or it is gone, or its disk has no locks
                pass
        yield free


def _recover(folder: Path) -> None:
    """Undoes what a killed process left: restores what it replaced, removes what it wrote."""
    for path in _siblings(folder.parent, _OLD, folder.name):
        partial = path.with_suffix(_PARTIAL)
        if partial.exists():
            with locked(partial) as free:
                if not free:
                    continue  # another process is between its two steps
        if os.path.lexists(folder):
            _remove(path)
        else:
            with contextlib.suppress(OSError):  # another process did it first
                path.rename(folder)
    remove_partial(folder.parent, folder.name)


def remove_partial(parent: Path, name: str | None = None) -> None:
    """Removes temporary files and folders that no process is writing any more.

    Args:
      parent: The folder that they are in.
      name: The name that they were made for; None for any name.
    """
    for path in _siblings(parent, _PARTIAL, name):
        if path.is_dir() and not path.is_symlink():
            with locked(path) as free:
                if free:
                    shutil.rmtree(path, ignore_errors=True)
        elif name is None:
            path.unlink(missing_ok=True)


def _siblings(parent: Path, suffix: str, name: str | None) -> list[Path]:
    """The hidden paths with a suffix that were made in a folder for a name; None for any name."""
    stem = ".+" if name is None else rf"{re.escape(name)}\.[a-z0-9_]{{8}}"
    pattern = re.compile(rf"\.{stem}{re.escape(suffix)}", re.DOTALL)
    return [path for path in parent.iterdir() if pattern.fullmatch(path.name)]


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """A path for a temporary file, renamed to `path` when the block succeeds.

    A killed process leaves a hidden sibling; the next writer of `path` removes it.

    Args:
      path: The file to make.
      force: Whether to replace what is at `path`.

    Raises:
      DestinationError: `path` exists, or appears during the block, and `force` is not set; or it
        cannot be written.
    """
    target = destination_path(path)
    _require_free(target, force)
    with scratch_folder(target, parents=False) as folder:
        temporary = folder / target.name
        try:
            yield temporary
            _sync(temporary)
            with where_supported():
                temporary.chmod(0o666 & ~_umask())
            _require_free(target, force)
            temporary.replace(target)
        except OSError as error:
            raise DestinationError(f"cannot write {target}: {error.strerror}") from error
