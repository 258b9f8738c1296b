"""`huggingface`: folders that `transformers` reads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recurrentgemma.common.errors import MismatchError
from recurrentgemma.common.io.arrays import same_bits
from recurrentgemma.common.io.checkpoint import CONFIG
from recurrentgemma.common.io.shards import ShardsWriter
from recurrentgemma.common.model.families import config_from_preset
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma_conversion.formats import Format
from recurrentgemma_conversion.names import config_from_fields, family_of, layout
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

    @property
    def _embedding(self) -> str:
        """The name of the table of embeddings."""
        return self.layout.pieces[_EMBEDDING][0].name

    def fetch(self, name: str) -> np.ndarray:
        tensor = self.shards.read(name)
        if self._head and name == self._embedding:
            untied = [h for h in self._head if not same_bits(tensor, self.shards.read(h))]
            if untied:
                problems = list(map(self._untied, untied))
                raise MismatchError(f"{self.path}: the tensors do not match the config", problems)
        return tensor

    def _problems(self) -> Sequence[str]:
        table = self.tensors.get(self._embedding)
        return [self._untied(name) for name, head in self._head.items() if head != table]

    def _untied(self, name: str) -> str:
        shape = self.shards.tensors[name].shape
        return f"unexpected {name} {shape}: it must be the embedding, to which it is tied"


@contextlib.contextmanager
def write_huggingface(folder: Path, contents: Contents) -> Iterator[Write]:
    """Writes what `from_pretrained` needs."""
    config, tokenizer, given = contents.config, contents.tokenizer, dict(contents.special_ids)
    stored = layout(config, Format.HUGGINGFACE)
    tensors, embedding = stored.tensors(contents.dtypes), stored.pieces[_EMBEDDING][0].name
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
