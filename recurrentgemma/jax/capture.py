"""A model's activations, by the names of its modules."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int

from recurrentgemma.common.model.activations import EMBEDDER
from recurrentgemma.common.model.params import tree_keys
from recurrentgemma.jax.cache import Cache
from recurrentgemma.jax.model import Model
from recurrentgemma.jax.runtime.trees import Params


def activations(
    model: Model,
    params: Params,
    tokens: Int[Array, "b t"],
    segment_pos: Int[Array, "b t"],
    cache: Cache | None = None,
    *,
    names: tuple[str, ...],
) -> tuple[dict[str, Float[Array, "b t _"]], Float[Array, "b t v"], Cache]:
    """What the named modules put out in a forward pass; of several outputs the first.

    Args:
      model: The model.
      params: Its parameters.
      tokens: As of the model.
      segment_pos: As of the model.
      cache: As of the model.
      names: Of `common.activations.activation_names`.

    Returns:
      The activations by name, the logits, and the new state.
    """

    def wanted(module: nn.Module, method: str) -> bool:
        name = ".".join(module.path)
        return name in names and method == ("encode" if name == EMBEDDER else "__call__")

    (logits, new_cache), captured = model.apply(
        {"params": params},
        tokens,
        segment_pos,
        cache,
        capture_intermediates=wanted,
        mutable=["intermediates"],
    )
    tree = captured.get("intermediates", {})
    return {name: _output(tree, name) for name in names}, logits, new_cache


def _output(tree: Any, name: str) -> Array:
    for key in tree_keys(name):
        tree = tree[key]
    ((output),) = tree["encode" if name == EMBEDDER else "__call__"]
    return output[0] if isinstance(output, tuple) else output
