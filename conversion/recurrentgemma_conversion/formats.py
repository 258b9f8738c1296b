"""The formats of checkpoints, and what they have in common."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.errors import PathError
from recurrentgemma.common.io.arrays import DTYPES, dtype_name


class Format(enum.StrEnum):
    """A published checkpoint format."""

    KAGGLE_FLAX = "kaggle-flax"
    KAGGLE_TORCH = "kaggle-torch"
    HUGGINGFACE = "huggingface"
    RECURRENTGEMMA = "recurrentgemma"
    GGUF = "gguf"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(f"a format must be one of {', '.join(cls)}, got {value!r}")


class Tensor(NamedTuple):
    """Shape and dtype of a stored tensor; the dtype is None where it is no float."""

    shape: tuple[int, ...]
    dtype: np.dtype | None

    @classmethod
    def of(cls, array: Any) -> Tensor:
        """Those of an array of either framework or NumPy."""
        return cls(tuple(np.shape(array)), DTYPES.get(dtype_name(getattr(array, "dtype", None))))


def require_utf8(path: Path, library: str) -> str:
    """The path as text, for a library that opens no other; `PathError` if it has none."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise PathError(
            f"{path}: {library} opens only names that are UTF-8: rename what is not"
        ) from error
    return str(path)
