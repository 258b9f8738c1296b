"""The names of a model's activations: those of the modules that put them out."""

from __future__ import annotations

import functools

from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.params import tree_keys

EMBEDDER = "embedder"


@functools.lru_cache(maxsize=32)
def activation_names(config: Config, inside: bool = False) -> tuple[str, ...]:
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
        keys = tree_keys(spec.path)
        for end in range(1, len(keys)):
            names.setdefault(".".join(keys[:end]))
    return tuple(name for name in reversed(names) if inside or _is_outer(name))


def _is_outer(name: str) -> bool:
    keys = tree_keys(name)
    return len(keys) == 1 or (len(keys) == 2 and keys[1].endswith("_block"))
