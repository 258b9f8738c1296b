"""Files whose parts are arrays that are read when they are used."""

from __future__ import annotations

import math
import mmap
import weakref
from pathlib import Path
from typing import Any

import numpy as np


class MappedFile:
    """A file that is mapped into memory; arrays are views of it.

    When nobody holds an array any more, its pages are given back to the system: copying a file part
    by part takes the memory of one part.
    """

    def __init__(self, path: Path, writable: bool = False) -> None:
        """Maps a file.

        Args:
          path: The file.
          writable: Whether arrays may be written to, which changes a private copy. Then Linux
            refuses a file that is larger than the memory.
        """
        with path.open("rb") as file:
            access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
            self._map = mmap.mmap(file.fileno(), 0, access=access)
        self._held: weakref.WeakValueDictionary[Any, np.ndarray] = weakref.WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._map)

    @property
    def data(self) -> memoryview:
        """All bytes."""
        return memoryview(self._map)

    def read(self, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """The array whose first byte is at an offset."""
        place = dtype, math.prod(shape), offset
        flat = self._held.get(place)
        if flat is None:
            self._held[place] = flat = np.frombuffer(self._map, *place)
            self._give_back_after(flat, offset)
        # NumPy gives views `flat` as their base, since the base of `flat` is no array.
        return flat.reshape(shape)

    def _give_back_after(self, flat: np.ndarray, offset: int) -> None:
        """Has the pages of an array given back when it ends."""
        # Only whole pages: the first and the last may also hold bytes of the neighbours.
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (offset + flat.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            advice = self._map.madvise, mmap.MADV_DONTNEED, start, length
            weakref.finalize(flat, *advice).atexit = False
