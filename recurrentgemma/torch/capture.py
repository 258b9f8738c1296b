"""A model's activations, by the names of its modules."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from recurrentgemma.common.model.activations import EMBEDDER
from recurrentgemma.torch.cache import Cache
from recurrentgemma.torch.model import Model


def activations(
    model: Model,
    tokens: Int[Tensor, "b t"],
    segment_pos: Int[Tensor, "b t"],
    cache: Cache | None = None,
    *,
    names: tuple[str, ...],
) -> tuple[dict[str, Float[Tensor, "b t _"]], Float[Tensor, "b t v"], Cache]:
    """What the named modules put out in a forward pass; of several outputs the first.

    Args:
      model: The model, with its parameters.
      tokens: As of the model.
      segment_pos: As of the model.
      cache: As of the model.
      names: Of `common.activations.activation_names`.

    Returns:
      The activations by name, the logits, and the new state.
    """
    captured: dict[str, Tensor] = {}

    def keep(name: str, output: Any) -> None:
        captured[name] = output[0] if isinstance(output, tuple) else output

    with contextlib.ExitStack() as hooks:
        for name in names:
            if name == EMBEDDER:  # `encode` is no forward pass: what the first block takes in
                handle = model.blocks[0].register_forward_pre_hook(
                    lambda _, args: keep(EMBEDDER, args)
                )
            else:
                handle = model.get_submodule(name).register_forward_hook(
                    functools.partial(lambda name, _, args, output: keep(name, output), name)
                )
            hooks.callback(handle.remove)
        logits, new_cache = model(tokens, segment_pos, cache)
    return {name: captured[name] for name in names}, logits, new_cache
