"""`kaggle-torch`: a state dict as `torch.save` writes it.

Reading maps the file through `torch.load(mmap=True, weights_only=True)`. Writing needs neither
PyTorch nor memory: the zip archive of such a file is a pickle that says which record holds which
tensor, and then the records, written one after the other.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recurrentgemma.common.errors import (
    DamagedError,
    MismatchError,
    MissingExtraError,
    UnsafePickleError,
)
from recurrentgemma.common.io.arrays import BFLOAT16, DTYPES, Stacked
from recurrentgemma.common.io.checkpoint import CONFIG
from recurrentgemma.common.io.shards import read_index, unwrapped
from recurrentgemma.common.io.tensor_files import write_array
from recurrentgemma_conversion.formats import Format, Tensor, require_utf8
from recurrentgemma_conversion.names import family_of, layout
from recurrentgemma_conversion.names.others import require_no_other
from recurrentgemma_conversion.readers.base import Contents, Reader, Write, around

if TYPE_CHECKING:
    import torch

PICKLE_INDEX = "pytorch_model.bin.index.json"
_STORAGES = {
    "bfloat16": "BFloat16Storage",
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
}
# The levels above a state dict in what trainers save.
_LEVELS = ("model_state_dict", "state_dict", "model", "module")
_ALIGNMENT = 64  # each record's, as torch.save does it
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same weights give the same file


class KaggleTorchReader(Reader):
    """A `.pt` file; its tensors are views of the mapped file.

    Raises:
      MissingExtraError: PyTorch is not installed.
      UnsafePickleError: The pickle wants to run code, or holds more than tensors.
    """

    format = Format.KAGGLE_TORCH

    def _open(self) -> None:
        self._state = self._headers.once(StateDict, self.path)
        self.tensors = self._state.tensors
        self.homes = [*around(self.path), self.path.parent.parent]

    def fetch(self, name: str) -> np.ndarray:
        return self._state.read(name)


class StateDict:
    """The state dict in a file of PyTorch, or in several with an index.

    Attributes:
      tensors: What there is, by name.
      paths: The files.

    Raises:
      DamagedError: A file is missing (all are named) or damaged.
      MismatchError: A tensor is in two files.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file alone, unless it is listed by the index beside it."""
        folder = path if path.is_dir() else path.parent
        index, self.paths = folder / PICKLE_INDEX, [path]
        listed = sorted(set(read_index(index).values())) if index.is_file() else []
        if path == folder or path.name in listed:
            missing = [name for name in listed if not (folder / name).is_file()]
            if missing:
                raise DamagedError(f"{folder} lacks {', '.join(missing)}")
            self.paths = [folder / name for name in listed]
        states = [load_state_dict(file) for file in self.paths]
        twice = {
            name for one, other in combinations(states, 2) for name in one.keys() & other.keys()
        }
        if twice:
            raise MismatchError(f"{folder} holds tensors twice", sorted(twice))
        state = {name: tensor for part in states for name, tensor in part.items()}
        self._state = {name: state[stored] for name, stored in unwrapped(state).items()}
        self.tensors = {name: Tensor(tuple(t.shape), _dtype(t)) for name, t in self._state.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor, where it can be a view of the mapped file."""
        return as_array(self._state[name])


def is_pickle(path: Path) -> bool:
    """Whether a file looks like what `torch.save` writes."""
    with path.open("rb") as file:
        start = file.read(4)
    zipped = start == b"PK\x03\x04"
    if zipped and path.suffix not in (".pt", ".pth", ".ckpt"):
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
        # It is cut short, and may be one of PyTorch's.
    return zipped or b"\x80\x02" <= start[:2] <= b"\x80\x05"


def import_torch(what: str = "reading a .pt file") -> Any:
    """PyTorch."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(what, "torch", "'recurrentgemma[torch]'") from error
    return torch


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A view of a tensor on the CPU."""
    import torch

    tensor = tensor.detach().resolve_neg()
    if tensor.dtype == torch.bfloat16:  # `tensor.numpy` does not know it
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def load_state_dict(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors in a file that `torch.save` wrote, by their stored names.

    Raises:
      MissingExtraError: PyTorch is not installed.
      UnsafePickleError: The pickle wants to run code, or holds more than tensors.
      DamagedError: The file cannot be read.
    """
    torch = import_torch()
    name = require_utf8(path, "PyTorch")
    zipped = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK" and not zipped:
        raise DamagedError(f"{path} is cut short: a zip archive without its directory")
    try:
        mapped = zipped and _is_stored(path)
        state: Any = torch.load(name, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's advice, the reason, and more advice.
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        reason = lines[len(lines) // 2]
        raise UnsafePickleError(
            f"{path} is no plain state dict, and loading it could run code: {reason}. Where you "
            "trust it, save its tensors alone: torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # a damaged file raises nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedError(f"{path} cannot be read: {reason}") from error
    if not isinstance(state, Mapping) or not state:
        raise UnsafePickleError(f"{path} must hold a state dict, got {type(state).__name__}")
    while True:
        levels = [state[level] for level in _LEVELS if isinstance(state.get(level), Mapping)]
        if not levels:
            break
        state = levels[0]
    require_no_other(path, map(str, state))
    others = [
        str(name)
        for name, value in state.items()
        if not isinstance(value, torch.Tensor) or value.is_nested or not isinstance(name, str)
    ]
    if others:
        raise UnsafePickleError(f"{path} must hold named tensors alone, got {', '.join(others)}")
    return state


def _is_stored(path: Path) -> bool:
    """Whether no record of a zip archive is compressed."""
    with zipfile.ZipFile(path) as archive:
        return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())


def _dtype(tensor: torch.Tensor) -> np.dtype | None:
    import torch

    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return None
    return DTYPES.get(str(tensor.dtype).removeprefix("torch."))


@contextlib.contextmanager
def write_kaggle_torch(folder: Path, contents: Contents) -> Iterator[Write]:
    """Writes `NAME.pt`, or `NAME.ckpt` with a level above the names, and our `config.json`."""
    family = family_of(contents.config)
    level = "" if family is None else family.level
    suffix = "ckpt" if level else "pt"
    tensors = layout(contents.config, Format.KAGGLE_TORCH).tensors(contents.dtypes)
    records = {name: f"data/{i}" for i, name in enumerate(tensors)}

    def record(name: str, array: np.ndarray | Stacked, dtype: np.dtype | None = None) -> None:
        info = zipfile.ZipInfo(f"{contents.name}/{name}", _EPOCH)
        size = math.prod(array.shape) * (array.dtype if dtype is None else dtype).itemsize
        large = size > zipfile.ZIP64_LIMIT // 2
        header = 30 + len(info.filename.encode()) + (20 if large else 0) + 4
        padding = -(file.tell() + header) % _ALIGNMENT
        info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        with archive.open(info, "w", force_zip64=large) as entry:
            write_array(entry, array, dtype)

    with (
        (folder / f"{contents.name}.{suffix}").open("xb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        record("data.pkl", np.frombuffer(_pickle(tensors, level), np.uint8))
        record("byteorder", np.frombuffer(b"little", np.uint8))
        yield lambda name, array: record(records[name], array, tensors[name][1])
        record("version", np.frombuffer(b"3\n", np.uint8))
    (folder / CONFIG).write_text(contents.config.to_json(), encoding="utf-8")


def _pickle(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], level: str = "") -> bytes:
    """The pickle of a state dict whose tensor number i is in record `data/i`.

    With a level it is the only value of a dict, under that key.
    """
    out = io.BytesIO()

    def text(value: str) -> None:
        out.write(pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode())

    def numbers(values: Iterable[int]) -> None:
        out.write(pickle.MARK)
        for value in values:
            out.write(pickle.LONG1 + bytes([9]) + value.to_bytes(9, "little"))
        out.write(pickle.TUPLE)

    out.write(pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK)
    if level:
        text(level)
        out.write(pickle.EMPTY_DICT + pickle.MARK)
    for i, (name, (shape, dtype)) in enumerate(tensors.items()):
        text(name)
        out.write(pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + pickle.MARK)
        out.write(pickle.MARK)
        text("storage")
        out.write(pickle.GLOBAL + f"torch\n{_STORAGES[dtype.name]}\n".encode())
        text(str(i))
        text("cpu")
        out.write(pickle.LONG1 + bytes([9]) + math.prod(shape).to_bytes(9, "little"))
        out.write(pickle.TUPLE + pickle.BINPERSID)
        out.write(pickle.BININT1 + b"\0")  # the offset in the storage
        numbers(shape)
        numbers(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        out.write(pickle.NEWFALSE)  # it requires no gradient
        out.write(pickle.GLOBAL + b"collections\nOrderedDict\n")  # its hooks: none
        out.write(pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.TUPLE + pickle.REDUCE)
    out.write(pickle.SETITEMS * (2 if level else 1) + pickle.STOP)
    return out.getvalue()
