"""Archives as downloaded: `archive.tar.gz`, unpacked beside the destination."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from pathlib import Path
from typing import Any

from recurrentgemma.common.errors import DamagedError, DiskSpaceError
from recurrentgemma.common.io.files import NO_ROOM, no_room, require_room


def is_archive(path: Path) -> bool:
    """Whether a file is a tar archive, compressed or not, by its first bytes."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if compressed else path.open("rb") as file:
            return file.read(262)[257:] == b"ustar"
    except (OSError, EOFError, zlib.error):
        return False


def unpack(path: Path, folder: Path, place: Path) -> None:
    """Unpacks an archive into a folder; its members must stay inside.

    Args:
      path: The archive.
      folder: The folder for its members.
      place: What messages call the disk of the folder.

    Raises:
      DamagedError: It is cut short, damaged, no tar archive, or names files outside the folder.
      DiskSpaceError: There is no room for its members.
    """
    try:
        with tarfile.open(path) as archive:
            require_room(place, sum(member.size for member in archive))
            archive.extractall(folder, filter="data")
            file: Any = archive.fileobj
            while file.read(1 << 20):
                pass  # the checksum of compressed data comes last
    except DiskSpaceError:
        raise
    except Exception as error:  # a damaged archive raises nearly anything
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise no_room(place, error) from error
        reason = str(error) or type(error).__name__
        raise DamagedError(f"{path} cannot be unpacked: {reason}") from error
