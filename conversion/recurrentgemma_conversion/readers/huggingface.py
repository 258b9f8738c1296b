"""`huggingface`: folders that `transformers` reads, quantised ones by `compressed-tensors`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recurrentgemma.common.errors import MismatchError
from recurrentgemma.common.io.arrays import DTYPES, cast, same_bits
from recurrentgemma.common.io.checkpoint import CONFIG
from recurrentgemma.common.io.shards import ShardsWriter
from recurrentgemma.common.model.families import config_from_preset
from recurrentgemma.common.model.layer_spec import ParamSpec
from recurrentgemma.common.quantization import Quantized, dequantize
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma_conversion.formats import Format, Tensor
from recurrentgemma_conversion.names import compressed, config_from_fields, family_of, layout
from recurrentgemma_conversion.names.family import COUNTS_ITSELF
from recurrentgemma_conversion.readers.base import Contents, Write
from recurrentgemma_conversion.readers.huggingface_tokenizer import write_tokenizer_files
from recurrentgemma_conversion.readers.native import SafetensorsReader

_EMBEDDING, _HEAD = "embedder.input_embedding", "lm_head.weight"
EMBEDDING = "embed_tokens.weight"  # how its name ends here, and in no other format
# As in the published vocabulary.
SPECIAL = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
GENERATION = "generation_config.json"
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION,
)


class HuggingFaceReader(SafetensorsReader):
    """A folder of `config.json` and safetensors or state dicts, or one of these files."""

    format = Format.HUGGINGFACE

    def _open(self) -> None:
        folder = self.path if self.path.is_dir() else self.path.parent
        self._fields: dict[str, Any] = {}
        if (folder / CONFIG).is_file() or (
            self._overrides.config or self._overrides.preset
        ) is None:
            self._fields = self._fields_at(folder / CONFIG)
        super()._open()
        self._packed: dict[str, list[str]] = {}  # the tensors of each quantised matrix
        self._damaged: list[str] = []
        self._scheme = ""
        if compressed.FIELD in self._fields:
            self._fold(folder / CONFIG)
        # Some tools store the tied output matrix, too.
        heads = [name for name in self.tensors if name.endswith(_HEAD)]
        self._head = {name: self.tensors.pop(name) for name in heads}
        self.special_ids = {name: self._fields[name] for name in SPECIAL if name in self._fields}
        self.companions = [folder / name for name in _COMPANIONS if (folder / name).is_file()]

    def _stated(self) -> Any:
        if not self._fields:
            table = next(t for n, t in self.tensors.items() if n.endswith(EMBEDDING))
            assert self._overrides.preset is not None  # as `_open` made sure
            return config_from_preset(self._overrides.preset, table.shape[0])
        if "model_type" not in self._fields:
            return super()._stated()
        said = {COUNTS_ITSELF: True} if self._overrides.trained_in_transformers else {}
        return config_from_fields(self.homes[0] / CONFIG, {**self._fields, **said})

    def _fold(self, config: Path) -> None:
        """Puts one tensor in the place of those of each quantised matrix."""
        self._bits = compressed.bits_of(config, self._fields[compressed.FIELD])
        matrices: dict[str, tuple[int, int, bool]] = {}
        for packed in [name for name in self.tensors if name.endswith(compressed.PACKED)]:
            name = packed.removesuffix(compressed.PACKED)
            parts = {
                part: self.shards.tensors[name + part]
                for part in (compressed.PACKED, compressed.SCALE, compressed.ZERO, compressed.SHAPE)
                if self.tensors.pop(name + part, None)
            }
            lacking = [p for p in (compressed.SCALE, compressed.SHAPE) if p not in parts]
            self._damaged += [f"missing {name}{part}" for part in lacking]
            if lacking:
                continue
            shape = tuple(map(int, np.ravel(self.shards.read(name + compressed.SHAPE))))
            scale, asymmetric = parts[compressed.SCALE], compressed.ZERO in parts
            dtype = scale.dtype if scale.dtype in DTYPES.values() else None
            if len(shape) != 2 or len(scale.shape) != 2 or dtype is None:
                self._damaged.append(f"{name} must have two axes and scales that are floats")
                continue
            sizes = (shape[0], scale.shape[1])
            wanted = compressed.tensor_shapes(shape, sizes, self._bits, asymmetric, dtype)
            self._damaged += [
                f"{name}{part} must be {dtype} of shape {size}, got {given.dtype} {given.shape}"
                for part, (size, dtype) in wanted.items()
                if ((given := parts[part]).shape, given.dtype) != (size, dtype)
            ]
            matrices[name] = (shape[1], scale.shape[1], asymmetric)
            self.tensors[name] = Tensor(shape, dtype)
            self._packed[name] = list(parts)
        if not self._damaged:
            self._scheme = compressed.scheme_of(self.path, self._bits, matrices)

    def stored_in(self, spec: ParamSpec) -> str | None:
        """The scheme that holds a matrix as it is stored, its rows of outputs in any order."""
        whole = all(piece.name in self._packed for piece in self.layout.pieces[spec.path])
        held = spec.matrix and whole and self.layout.in_rows(spec)
        return self._scheme or None if held else None

    def fetch_quantized(self, name: str) -> Sequence[np.ndarray]:
        parts = {part: self.shards.read(name + part) for part in self._packed[name]}
        return compressed.decode(parts, self._bits)

    @property
    def _embedding(self) -> str:
        """The name of the table of embeddings."""
        return self.layout.pieces[_EMBEDDING][0].name

    def fetch(self, name: str) -> np.ndarray:
        """A stored tensor; a quantised matrix is dequantised."""
        if name in self._packed:
            values, scale, *rest = self.fetch_quantized(name)
            held = Quantized(values, scale, rest[0] if rest else None, self._scheme, -1)
            dtype = self.tensors[name].dtype
            assert dtype is not None  # as `_fold` made sure
            return cast(dequantize(held), dtype)
        tensor = self.shards.read(name)
        if self._head and name == self._embedding:
            untied = [h for h in self._head if not same_bits(tensor, self.shards.read(h))]
            if untied:
                problems = list(map(self._untied, untied))
                raise MismatchError(f"{self.path}: the tensors do not match the config", problems)
        return tensor

    def _problems(self) -> Sequence[str]:
        table = self.tensors.get(self._embedding)
        untied = [self._untied(name) for name, head in self._head.items() if head != table]
        return self._damaged + untied

    def _untied(self, name: str) -> str:
        shape = self.shards.tensors[name].shape
        return f"unexpected {name} {shape}: it must be the embedding, to which it is tied"


@contextlib.contextmanager
def write_huggingface(folder: Path, contents: Contents) -> Iterator[Write]:
    """Writes what `from_pretrained` needs."""
    config, tokenizer, given = contents.config, contents.tokenizer, dict(contents.special_ids)
    stored = layout(config, Format.HUGGINGFACE)
    tensors = stored.tensors(contents.dtypes, contents.scheme)
    embedding = stored.pieces[_EMBEDDING][0].name
    with ShardsWriter(folder, tensors, {"format": "pt"}, contents.shard_size) as shards:
        yield shards.write
    ids: dict[str, Any] = SPECIAL if tokenizer is None else special_ids(tokenizer)
    ends: dict[str, Any] = {}
    if tokenizer is not None and tokenizer.end_of_turn_id is not None:
        ends["eos_token_id"] = [tokenizer.eos_id, tokenizer.end_of_turn_id]
    family = family_of(config)
    assert family is not None  # or else there were no names for its parameters
    fields = family.to_fields(config, tensors[embedding][1].name)
    if contents.as_published:
        fields = family.as_published(fields)
    if contents.scheme is not None:
        dense = [
            piece.name.removesuffix(".weight")
            for spec in stored.specs
            if spec.matrix and not stored.scheme_for(spec, contents.scheme)
            for piece in stored.pieces[spec.path]
            if piece.name.endswith(".weight")
        ]
        fields[compressed.FIELD] = compressed.config_fields(contents.scheme, dense)
    _write_json(folder / CONFIG, fields | ids | given)
    _write_json(folder / GENERATION, ids | ends | given)
    if tokenizer is not None:
        write_tokenizer_files(folder, tokenizer)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The special tokens, by the names that configs have for them."""
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    return dict(zip(SPECIAL, ids, strict=True))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
