"""Adapters in the layout of PEFT, for `transformers`' model: its names, and writing it.

A is stored as [rank, I], B as [J, rank].
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from recurrentgemma.common.errors import MismatchError, UnknownFormatError
from recurrentgemma.common.io.files import whole_folder
from recurrentgemma.common.io.tensor_files import write_tensors
from recurrentgemma.common.training.adapters import Adapters
from recurrentgemma.common.training.lora import MAGNITUDE, adapter_specs, lora_targets
from recurrentgemma_conversion.formats import Format
from recurrentgemma_conversion.names import layout
from recurrentgemma_conversion.names.table import Piece

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # before the name of a module
A, B = "lora_A", "lora_B"
# A folder in the cache of Hugging Face's hub.
_CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<model>[^/]+)/snapshots/[^/]+$")


def write_peft(
    path: str | os.PathLike[str],
    adapters: Adapters,
    base: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
) -> None:
    """Writes a folder that PEFT loads on a model of `transformers`.

    Args:
      path: The folder.
      adapters: The adapters.
      base: The folder, or the name on Hugging Face's hub, of their model, which
        `AutoPeftModelForCausalLM` loads.
      force: Whether to replace a folder that is there.

    Raises:
      UnknownFormatError: There are adapters of gates, which are no linear layers there.
      MismatchError: They are DoRA's.
      CheckpointError: `path` exists and `force` is not set, or the disk has too little room.
    """
    tensors = dict(_tensors(adapters))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else os.fspath(base),
        "inference_mode": True,
        "r": adapters.options.rank,
        "lora_alpha": adapters.options.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    with whole_folder(path, force=force, size=size) as folder:
        text = json.dumps(config, indent=2) + "\n"
        (folder / PEFT_CONFIG).write_text(text, encoding="utf-8")
        write_tensors(folder / PEFT_WEIGHTS, tensors, {"format": "pt"})


def hub_name(path: Path) -> str | None:
    """The name on the hub of a folder in the cache of Hugging Face's hub."""
    found = _CACHED.search(path.as_posix())
    return f"{found['owner']}/{found['model']}" if found else None


def _tensors(adapters: Adapters) -> Iterator[tuple[str, np.ndarray]]:
    """PEFT's names and arrays for each linear layer."""
    more = [name for name in adapters.arrays if name.endswith(f".{MAGNITUDE}")]
    if more:
        raise MismatchError("DoRA's adapters are merged, not written: there are", more)
    stored = layout(adapters.config, Format.HUGGINGFACE)
    for target in lora_targets(adapters.config, adapters.options):
        pair = adapter_specs(target, adapters.options.rank)
        for piece in stored.pieces[target.path]:
            if not is_linear(piece):
                raise UnknownFormatError(
                    f"PEFT's layout has no adapters of {piece.name}, which is no linear layer; "
                    "train without the target gates"
                )
            module = piece.name.removesuffix(".weight")
            for spec, name in zip(pair, (A, B), strict=True):
                matrix = adapters.arrays[spec.path]
                matrix = matrix if piece.part is None else matrix[piece.part]
                yield f"{PREFIX}{module}.{name}.weight", matrix.swapaxes(-1, -2)


def is_linear(piece: Piece) -> bool:
    """Whether a stored tensor is the weight of a linear layer, [J, I]."""
    return piece.name.endswith(".weight") and piece.order == (1, 0) and piece.rows is None
