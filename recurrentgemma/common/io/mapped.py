"""Files whose parts are arrays that are read when they are used."""

from __future__ import annotations

import math
import mmap
import weakref
from pathlib import Path

import numpy as np


class MappedFile:
    """A file in memory, of which arrays are views; writing to one changes a private copy.

    When nobody holds an array any more, its pages are given back to the system: what copies a file
    part by part needs the memory of a part, not that of the file.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __len__(self) -> int:
        return len(self._map)

    @property
    def data(self) -> memoryview:
        """All bytes."""
        return memoryview(self._map)

    def read(self, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """The array whose first byte is at an offset."""
        flat = np.frombuffer(self._map, dtype, math.prod(shape), offset)
        # Whole pages alone: those at the ends have bytes of the neighbours.
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (offset + flat.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            # Views of it hold `flat` itself, since what that is a view of is no array.
            given_up = self._map.madvise, mmap.MADV_DONTNEED, start, length
            weakref.finalize(flat, *given_up).atexit = False
        return flat.reshape(shape)
