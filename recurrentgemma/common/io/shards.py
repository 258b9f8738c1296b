"""Weights in one safetensors file, or in several with an index: Hugging Face's layout and ours."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recurrentgemma.common.errors import DamagedError, MismatchError
from recurrentgemma.common.io.arrays import Stacked
from recurrentgemma.common.io.tensor_files import TensorFile, TensorFileWriter, TensorInfo

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_SIZE = 5_000_000_000

# What PyTorch's wrappers of modules put into names, and how the names of models begin.
_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ROOTS = ("embedder.", "blocks.", "final_norm.", "model.", "lm_head.")

Tensors = Mapping[str, tuple[tuple[int, ...], np.dtype]]


class Shards:
    """The tensors of a folder, whichever of its files they are in.

    Attributes:
      tensors: What there is, by name.
      files: The file of each tensor.
      paths: The files, in the order of their names.

    Raises:
      DamagedError: A file is missing (all are named) or damaged.
      MismatchError: The index and the files disagree.
    """

    def __init__(self, path: Path) -> None:
        """Opens what an index or `model.safetensors` in a folder says, or all that is there.

        A file is opened alone, unless the index beside it lists it.
        """
        folder = path if path.is_dir() else path.parent
        promised = read_index(folder / INDEX) if (folder / INDEX).is_file() else {}
        names = sorted(set(promised.values()))
        if names and (path == folder or path.name in names):
            present = {file.name for file in folder.iterdir() if file.is_file()}
            missing = [name for name in names if name not in present]
            if missing:
                raise DamagedError(f"{folder} lacks {', '.join(missing)}")
            opened = {name: TensorFile(folder / name) for name in names}
            _require_index(folder / INDEX, promised, opened)
        else:
            found = [path]
            if path == folder:
                whole = folder / WEIGHTS
                found = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
            opened = {file.name: TensorFile(file) for file in found}
        self.paths = [file.path for file in opened.values()]
        self.files: dict[str, TensorFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in opened.values():
            twice = sorted(file.tensors.keys() & self.tensors.keys())
            if twice:
                raise MismatchError(f"{path} holds tensors twice", twice)
            self.files |= dict.fromkeys(file.tensors, file)
            self.tensors |= file.tensors
        self._stored = unwrapped(self.tensors)
        self.files = {name: self.files[stored] for name, stored in self._stored.items()}
        self.tensors = {name: self.tensors[stored] for name, stored in self._stored.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor, as a view of its file."""
        return self.files[name].read(self._stored[name])


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """The tensors' own names, each with its stored name.

    Stored names may have parts that `torch.compile`, data parallelism and the like put in, and a
    first part that all of them share, such as "module" or a Lightning module's attribute.
    """
    stored = {_WRAPPERS.sub(r"\1", name): name for name in names}
    while True:
        pairs = [name.partition(".")[::2] for name in stored]
        firsts = {first for first, _ in pairs}
        known = all(rest.startswith(_ROOTS) for _, rest in pairs)
        if len(firsts) != 1 or not known or firsts == {"language_model"}:
            return stored
        stored = {name.partition(".")[2]: old for name, old in stored.items()}


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, by the tensors' names.

    Raises:
      DamagedError: It is no index.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8-sig"))["weight_map"]
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
                raise TypeError(f"the file of {name} must be a name in this folder, got {file!r}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} is no index of files with tensors: {error!r}") from error
    return weight_map


def _require_index(
    index: Path, promised: Mapping[str, str], opened: Mapping[str, TensorFile]
) -> None:
    actual = {(name, file) for file, opened_file in opened.items() for name in opened_file.tensors}
    problems = [f"no {name} in {file}" for name, file in sorted(promised.items() - actual)]
    problems += [f"{name} in {file} is not listed" for name, file in
                 sorted(actual - promised.items())]  # fmt: skip
    if problems:
        raise MismatchError(f"{index} does not fit the files beside it", problems)


class ShardsWriter(contextlib.AbstractContextManager["ShardsWriter"]):
    """Writes tensors, given one at a time in the order declared, in files of a limited size."""

    def __init__(
        self, folder: Path, tensors: Tensors, metadata: Mapping[str, str], shard_size: int
    ) -> None:
        """Plans the files.

        Args:
          folder: Where they go.
          tensors: Shape and dtype of each tensor, by name.
          metadata: Kept in the header of each file.
          shard_size: Bytes of tensors in a file, at most, unless one tensor is larger.
        """
        self._folder, self._metadata = folder, metadata
        shards = plan_shards(tensors, shard_size)
        self._planned = iter(shards.items())
        self._files = contextlib.ExitStack()  # holds the file that is being written
        self._pending: list[str] = []  # its tensors that are still to come
        if len(shards) > 1:
            weight_map = {name: file for file, part in shards.items() for name in part}
            index = {
                "metadata": {"total_size": num_bytes(tensors)},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, array: np.ndarray | Stacked) -> None:
        """Writes the next tensor, cast to the declared dtype."""
        if not self._pending:
            file, part = next(self._planned)
            self._pending = list(part)
            self._writer = self._files.enter_context(
                TensorFileWriter(self._folder / file, part, self._metadata)
            )
        self._writer.write(name, array)
        self._pending.pop(0)
        if not self._pending:
            self._files.close()

    def __exit__(self, *error: Any) -> bool | None:
        return self._files.__exit__(*error)


def plan_shards(tensors: Tensors, shard_size: int) -> dict[str, Tensors]:
    """Which tensors go into which file, in order: each file is filled before the next."""
    shards: list[dict[str, tuple[tuple[int, ...], np.dtype]]] = [{}]
    for name, (shape, dtype) in tensors.items():
        tensor = {name: (shape, dtype)}
        if shards[-1] and num_bytes(shards[-1]) + num_bytes(tensor) > shard_size:
            shards.append({})
        shards[-1] |= tensor
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": part for i, part in enumerate(shards, 1)}


def num_bytes(tensors: Tensors) -> int:
    """The bytes of tensors."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
