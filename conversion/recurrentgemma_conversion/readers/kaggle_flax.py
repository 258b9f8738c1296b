"""`kaggle-flax`: an Orbax checkpoint directory.

Orbax stores each array as zarr, in files of its own or together in an OCDBT database. Files of
uncompressed arrays, such as those written here, are mapped; others are read through TensorStore,
one array at a time. Both layouts can be written, uncompressed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.errors import DamagedError, MissingExtraError, UnknownFormatError
from recurrentgemma.common.io.arrays import BFLOAT16, DTYPES, Stacked, cast
from recurrentgemma.common.io.checkpoint import CONFIG
from recurrentgemma.common.io.tensor_files import write_array
from recurrentgemma.common.model.params import tree_keys
from recurrentgemma_conversion.formats import Format, Tensor, require_utf8
from recurrentgemma_conversion.names import layout
from recurrentgemma_conversion.names.stacked import places
from recurrentgemma_conversion.readers.base import Contents, Reader, Write, around

DATABASE = "manifest.ocdbt"
_ZARR = ".zarray"
_ZARR_DTYPES = {"<f2": "float16", "<f4": "float32", "<f8": "float64", "bfloat16": "bfloat16"}
_SEPARATORS = (".", "/")
_CHUNK = 64 << 20  # bytes of an array that go into a database together
_WRAPPER = "params."
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"


class _Array(NamedTuple):
    """A zarr array: its metadata, and the chunks that are there."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    metadata: dict[str, Any]


class KaggleFlaxReader(Reader):
    """An Orbax directory, of either layout, with or without a level `params`.

    Layers that are stacked are read as if each had tensors of its own.

    Raises:
      MissingExtraError: It takes TensorStore to read, and that is not installed.
    """

    format = Format.KAGGLE_FLAX

    def _open(self) -> None:
        path = self.path
        self._database = (path / DATABASE).is_file()
        files = _database_keys(path) if self._database else _file_keys(path)
        arrays = _arrays(path, files)
        if not arrays:
            raise UnknownFormatError(f"{path} is no Orbax checkpoint: it holds no arrays")
        wrapped = all(name.startswith(_WRAPPER) for name in arrays)
        self._prefix = _WRAPPER if wrapped else ""
        self._arrays = {name.removeprefix(self._prefix): a for name, a in arrays.items()}
        self._dtypes = {
            name: DTYPES.get(_ZARR_DTYPES.get(str(a.metadata["dtype"]), ""))
            for name, a in self._arrays.items()
        }
        self._places = places({name: array.shape for name, array in self._arrays.items()})
        self.tensors = {
            name: Tensor(place.shape, self._dtypes[place.name])
            for name, place in self._places.items()
        }
        self.homes = [path, *around(path)]

    def fetch(self, name: str) -> np.ndarray:
        name, part, _ = self._places[name]
        array, dtype = self._arrays[name], self._dtypes[name]
        assert dtype is not None  # checked when opened
        folder = self.path / (self._prefix + name)
        meta = array.metadata
        plain = meta.get("compressor") is None and not meta.get("filters")
        whole = array.chunks == array.shape and meta["order"] == "C"
        chunk = folder / _chunk_name((0,) * len(array.shape), meta)
        if not self._database and plain and whole and chunk.is_file():
            expected = math.prod(array.shape) * dtype.itemsize
            if chunk.stat().st_size != expected:
                raise DamagedError(
                    f"{chunk} must have {expected} bytes, got {chunk.stat().st_size}"
                )
            whole_array = np.memmap(chunk, dtype, "c", shape=array.shape)
            return whole_array if part is None else whole_array[part]
        return self._read_store(folder, name, part)

    def _read_store(self, folder: Path, name: str, part: int | None) -> np.ndarray:
        ts = import_tensorstore()
        store = (
            {"driver": "ocdbt", "base": _files(self.path), "path": f"{self._prefix}{name}/"}
            if self._database
            else _files(folder)
        )
        try:
            stored = ts.open({"driver": "zarr", "kvstore": store}, read=True).result()
            value = (stored if part is None else stored[part]).read().result()
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            raise DamagedError(f"{self.path}: {name} cannot be read: {_reason(error)}") from error
        return value.view(BFLOAT16) if self._dtypes[name] == BFLOAT16 else value


def import_tensorstore(what: str = "reading this Orbax checkpoint") -> Any:
    """TensorStore, which comes with Orbax."""
    try:
        import tensorstore
    except ImportError as error:
        raise MissingExtraError(what, "tensorstore", "'recurrentgemma[jax]'") from error
    return tensorstore


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _database_keys(path: Path) -> Mapping[str, Any]:
    """The keys of an OCDBT database, each with the database."""
    ts = import_tensorstore()
    spec = {"driver": "ocdbt", "base": _files(path)}
    try:
        database = ts.KvStore.open(spec).result()
        keys = [key.decode() for key in database.list().result()]
    except (ValueError, OSError, RuntimeError) as error:
        raise DamagedError(f"{path} cannot be read: {_reason(error)}") from error
    return dict.fromkeys(keys, database)


def _file_keys(path: Path) -> Mapping[str, Any]:
    """The files of a directory tree, relative to it, each with None."""
    found: dict[str, Any] = {}
    for folder, _, names in os.walk(path):
        files = (file for name in names if (file := Path(folder, name)).is_file())
        found |= dict.fromkeys(file.relative_to(path).as_posix() for file in files)
    return found


def _arrays(path: Path, keys: Mapping[str, Any]) -> dict[str, _Array]:
    """The zarr arrays among keys.

    Raises:
      DamagedError: Chunks or metadata are missing or damaged.
    """
    if any(key.endswith("/zarr.json") for key in keys):
        raise UnknownFormatError(f"{path} is stored as zarr 3; only zarr 2 is read")
    chunks = {
        key.removesuffix(f"/{_ZARR}"): set[str]() for key in keys if key.endswith(f"/{_ZARR}")
    }
    for key in keys:
        for name in itertools.accumulate(key.split("/")[:-1], "{}/{}".format):
            if name in chunks:
                chunks[name].add(key.removeprefix(f"{name}/"))
    arrays, problems = {}, []
    for name in sorted(chunks):
        key = f"{name}/{_ZARR}"
        try:
            text = (path / key).read_bytes() if keys[key] is None else keys[key][key.encode()]
            arrays[name] = _parse(json.loads(text))
        except (ValueError, TypeError, KeyError, OSError, RuntimeError, RecursionError) as error:
            raise DamagedError(f"{path}: {key} is damaged: {error!r}") from error
        problems += _missing_chunks(name, arrays[name], chunks[name])
    if problems:
        raise DamagedError(f"{path} lacks {len(problems)} chunks: {', '.join(problems)}")
    return arrays


def _parse(metadata: Any) -> _Array:
    shape, chunks = tuple(metadata["shape"]), tuple(metadata["chunks"])
    if not all(type(size) is int and size > 0 for size in (*shape, *chunks)):
        raise ValueError(f"sizes must be positive, got {shape=} {chunks=}")
    if len(shape) != len(chunks) or metadata["order"] not in ("C", "F"):
        raise ValueError(f"not the metadata of an array: {metadata}")
    if metadata.get("dimension_separator") not in (None, *_SEPARATORS):
        raise ValueError(f"dimension_separator must be one of {', '.join(_SEPARATORS)}")
    return _Array(shape, chunks, metadata | {"dtype": metadata["dtype"]})


def _missing_chunks(name: str, array: _Array, present: set[str]) -> list[str]:
    if array.metadata.get("fill_value") is not None:
        return []  # the value of chunks that are missing
    grid = [-(-size // chunk) for size, chunk in zip(array.shape, array.chunks, strict=True)]
    if math.prod(grid) > len(present):
        return [f"{math.prod(grid) + 1 - len(present)} or more of {name}"]
    names = (_chunk_name(index, array.metadata) for index in itertools.product(*map(range, grid)))
    return [f"{name}/{chunk}" for chunk in names if chunk not in present]


def _chunk_name(index: tuple[int, ...], metadata: Mapping[str, Any]) -> str:
    return str(metadata.get("dimension_separator") or ".").join(map(str, index))


@contextlib.contextmanager
def write_kaggle_flax(folder: Path, contents: Contents) -> Iterator[Write]:
    """Writes `NAME/` with our `config.json` beside it.

    Each array is an uncompressed file of its own, or all are in an OCDBT database if that is asked
    for, which takes TensorStore.
    """
    root = folder / contents.name
    tensors = layout(contents.config, Format.KAGGLE_FLAX).tensors(contents.dtypes)
    write = _Database(root).write if contents.ocdbt else functools.partial(_write_folder, root)
    root.mkdir()
    yield lambda name, array: write(name, array, tensors[name][1])
    _write_json(root / "_METADATA", orbax_metadata(tensors, ocdbt=contents.ocdbt))
    _write_json(root / "_CHECKPOINT_METADATA", {"item_handlers": _HANDLER})
    (root / "commit_success.txt").write_text("Checkpoint commit was successful\n")
    (folder / CONFIG).write_text(contents.config.to_json(), encoding="utf-8")


def _write_folder(root: Path, name: str, array: np.ndarray | Stacked, dtype: np.dtype) -> None:
    """Writes an array in a folder of its own, as one chunk."""
    metadata = _zarr_metadata(array.shape, array.shape, dtype)
    (root / name).mkdir(parents=True)
    _write_json(root / name / _ZARR, metadata)
    with (root / name / _chunk_name((0,) * len(array.shape), metadata)).open("xb") as file:
        write_array(file, array, dtype)


class _Database:
    """Arrays in an OCDBT database, cut along their first axis."""

    def __init__(self, root: Path) -> None:
        self._ts = import_tensorstore("writing OCDBT")
        self._base = _files(root)
        # Everything is flushed together, at the end.
        self._context = self._ts.Context({"file_io_sync": False})

    def write(self, name: str, array: np.ndarray | Stacked, dtype: np.dtype) -> None:
        row_bytes = math.prod(array.shape[1:]) * dtype.itemsize
        rows = min(len(array), max(1, _CHUNK // row_bytes))
        request = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": self._base, "path": f"{name}/"},
            "metadata": _zarr_metadata(array.shape, (rows, *array.shape[1:]), dtype),
        }
        try:
            stored = self._ts.open(request, create=True, context=self._context).result()
            for i in range(0, len(array), rows):
                part = cast(array[i : i + rows], dtype)
                stored[i : i + len(part)].write(part).result()
        except ValueError as error:
            number = re.search(r"os_error_code='(\d+)'", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _zarr_metadata(
    shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype
) -> dict[str, Any]:
    return {
        "chunks": chunks,
        "compressor": None,
        "dimension_separator": ".",
        "dtype": next(zarr for zarr, name in _ZARR_DTYPES.items() if name == dtype.name),
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": shape,
        "zarr_format": 2,
    }


def _files(folder: Path) -> dict[str, str]:
    """TensorStore's name of a folder; a URL would have to be quoted."""
    return {"driver": "file", "path": f"{require_utf8(folder.absolute(), 'TensorStore')}/"}


def orbax_metadata(names: Iterable[str], *, ocdbt: bool) -> dict[str, Any]:
    """Orbax's `_METADATA`: the tree whose leaves the arrays are.

    It calls them NumPy arrays: for JAX arrays Orbax would want to know the devices.
    """
    tree = {}
    for name in names:
        keys = tree_keys(name)
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    return {"tree_metadata": tree, "use_ocdbt": ocdbt, "use_zarr3": False}


def _write_json(path: Path, value: Any) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(value, file, separators=(",", ":"))
