"""Published names whose home is another module, imported when they are first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def elsewhere(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__`.

    Args:
      module: The name of the module.
      homes: The module in which each name lives.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return find


# Names that published code finds in `recurrentgemma.jax.layers` and `recurrentgemma.torch.layers`.
JAX_LAYERS = {
    "RGLRU": "recurrentgemma.jax.rg_lru",
    "rnn_real_param_init": "recurrentgemma.jax.scan.published",
    "stable_sqrt_bwd": "recurrentgemma.jax.scan.published",
    "stable_sqrt_fwd": "recurrentgemma.jax.scan.published",
}
TORCH_LAYERS = {
    "RGLRU": "recurrentgemma.torch.rg_lru",
    "SqrtBoundDerivative": "recurrentgemma.torch.scan.published",
    "rnn_param_init": "recurrentgemma.torch.scan.published",
    "rnn_scan": "recurrentgemma.torch.scan.published",
}
