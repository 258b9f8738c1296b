"""Adapters in the layout of PEFT, for `transformers`' model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import numpy as np

from recurrentgemma.common.errors import UnknownFormatError
from recurrentgemma.common.io.files import whole_folder
from recurrentgemma.common.io.tensor_files import write_tensors
from recurrentgemma.common.training.adapters import Adapters
from recurrentgemma.common.training.lora import adapter_specs, lora_targets
from recurrentgemma_conversion.formats import Format
from recurrentgemma_conversion.names import layout


def write_peft(path: str | os.PathLike[str], adapters: Adapters, *, force: bool = False) -> None:
    """Writes a folder that PEFT loads on a model of `transformers`.

    Raises:
      UnknownFormatError: There are adapters of gates, which are no linear layers there.
      CheckpointError: `path` exists and `force` is not set, or the disk has too little room.
    """
    tensors = dict(_tensors(adapters))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
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
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def _tensors(adapters: Adapters) -> Iterator[tuple[str, np.ndarray]]:
    """PEFT's names and arrays: A as [rank, I], B as [J, rank], for each linear layer."""
    stored = layout(adapters.config, Format.HUGGINGFACE)
    for target in lora_targets(adapters.config, adapters.options):
        pair = adapter_specs(target, adapters.options.rank)
        for piece in stored.pieces[target.path]:
            module, _, leaf = piece.name.rpartition(".")
            if leaf != "weight" or piece.order != (1, 0) or piece.rows is not None:
                raise UnknownFormatError(
                    f"PEFT's layout has no adapters of {piece.name}, which is no linear layer; "
                    "train without the target gates"
                )
            for spec, name in zip(pair, ("lora_A", "lora_B"), strict=True):
                matrix = adapters.arrays[spec.path]
                matrix = matrix if piece.part is None else matrix[piece.part]
                yield f"base_model.model.{module}.{name}.weight", matrix.swapaxes(-1, -2)
