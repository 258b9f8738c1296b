"""The names of a model's activations: those of the modules that put them out."""

from __future__ import annotations

import functools

from recurrentgemma.common.model.config import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec

EMBEDDER = "embedder"


@functools.lru_cache(maxsize=32)
def activation_names(config: GriffinConfig, inside: bool = False) -> tuple[str, ...]:
    """Every activation's name, in the order of the forward pass; a module after its parts.

    "embedder" is what enters the first block, "blocks.N" the residual stream after block N, and
    "blocks.N.recurrent_block", "blocks.N.attention_block" and "blocks.N.mlp_block" what is added to
    it.

    Args:
      config: What the model is.
      inside: Whether to name what is inside of these, too: norms, linear maps, gates and so on.
    """
    names: dict[str, None] = {}  # ordered; from the last to the first
    for spec in reversed(layer_spec(config)):
        parts = spec.path.split(".")[:-1]
        first = 2 if parts[0] == "blocks" else 1
        for end in range(first, len(parts) + 1):
            names.setdefault(".".join(parts[:end]))
    return tuple(name for name in reversed(names) if inside or _is_outer(name))


def _is_outer(name: str) -> bool:
    inside_of_block = name.split(".")[2:]
    return not inside_of_block or (
        len(inside_of_block) == 1 and inside_of_block[0].endswith("_block")
    )
