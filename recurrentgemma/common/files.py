"""Folders that appear whole or not at all, and room for them on the disk."""

from __future__ import annotations

import contextlib
import errno
import os
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
      DestinationError: `path` exists and `force` is not set, or its parent is no folder.
      DiskSpaceError: There is no room for `size` bytes, or no longer.
    """
    folder = Path(path).expanduser().absolute()
    if (folder.exists() or folder.is_symlink()) and not force:
        raise DestinationError(f"{folder} exists; pass force=True to replace it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _recover(folder)
        require_room(folder.parent, size)
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent)
        )
    except OSError as error:
        raise DestinationError(f"cannot write {folder}: {error.strerror}") from error
    with _locked(temporary):
        try:
            yield temporary
            flush(temporary)
            temporary.chmod(0o755)
            _rename(temporary, folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise DiskSpaceError(f"the disk of {folder} became full") from error
            raise


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


def _rename(temporary: Path, folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        old = temporary.with_suffix(".old")
        folder.rename(old)
        try:
            temporary.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        _remove(old)
    else:
        temporary.rename(folder)
    _sync(folder.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(path: Path) -> None:
    """Puts a file, or the names in a folder, on the disk, where folders can be opened."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the lock that says that a process writes this folder; whether it was free."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _recover(folder: Path) -> None:
    """Clears what a killed process left: what it replaced comes back, what it wrote goes."""
    old = [p for p in folder.parent.glob(".*.old") if p.name.startswith(f".{folder.name}.")]
    for path in old:
        if folder.exists():
            _remove(path)
        else:
            path.rename(folder)
    remove_partial(folder.parent, folder.name)


def remove_partial(parent: Path, name: str = "") -> None:
    """Removes the temporary siblings, in a folder, that no process is writing any more.

    Args:
      parent: The folder.
      name: What they were to become; anything if empty.
    """
    for path in parent.glob(".*.partial"):
        if not path.name.startswith(f".{name}." if name else "."):
            continue
        if path.is_dir() and not path.is_symlink():
            with _locked(path) as free:
                if free:
                    shutil.rmtree(path, ignore_errors=True)
        elif not name:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """A temporary sibling to write to; once the block ends well it takes the name `path`.

    Args:
      path: The file to make.
      force: Whether to replace what is at `path`.

    Raises:
      DestinationError: `path` exists and `force` is not set, or cannot be written.
    """
    target = Path(path).expanduser().absolute()
    if target.exists() and not force:
        raise DestinationError(f"{target} exists; pass force=True to replace it")
    try:
        descriptor, name = tempfile.mkstemp(
            prefix=f".{target.name}.", suffix=".partial", dir=target.parent
        )
    except OSError as error:
        raise DestinationError(f"cannot write {target}: {error.strerror}") from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        raise DestinationError(f"cannot write {target}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
