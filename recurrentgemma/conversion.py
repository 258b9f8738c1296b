"""Parameters in memory from one framework to the other, bit for bit, as published.

Checkpoints on disk are converted by `recurrentgemma_conversion`. A framework is imported when a
function needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from recurrentgemma.common.model.state_dict import flax_path, to_torch, torch_name

if TYPE_CHECKING:
    import jax
    import torch

_LEVEL = "params."


def jax_array_to_torch_tensor(x: jax.Array) -> torch.Tensor:
    """A tensor on the CPU with the values and the dtype of an array, in memory of its own."""
    import numpy as np

    from recurrentgemma.torch.runtime.arrays import to_tensor

    return to_tensor(np.array(x))


def torch_tensor_to_jax_array(x: torch.Tensor) -> jax.Array:
    """An array with the values of a tensor, and its dtype if JAX has that, in memory of its own."""
    import jax.numpy as jnp

    from recurrentgemma.torch.runtime.arrays import to_array

    return jnp.array(to_array(x))


def flatten_nested_dict(nested_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested dictionary, by the keys that lead to them, joined by dots.

    Args:
      nested_dict: The dictionary.
      prefix: What all the names begin with.
    """
    flat: dict[str, Any] = {}
    for key, value in nested_dict.items():
        if isinstance(value, Mapping):
            flat |= flatten_nested_dict(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def flax_params_to_pytorch_state_dict(params: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A PyTorch state dict from Flax parameters of any model with our names.

    A level `params` stays in the names, as published: pass `variables["params"]` for a state dict
    that `Griffin.load_state_dict` takes.
    """
    return {
        torch_name(path): to_torch(path, jax_array_to_torch_tensor(value)).contiguous()
        for path, value in flatten_nested_dict(params).items()
    }


def pytorch_state_dict_to_flax_params(
    state_dict: Mapping[str, torch.Tensor],
) -> dict[str, dict[str, Any]]:
    """Flax parameters, in a level `params`, from a state dict of any model with our names.

    The names may begin with `params.` or not.
    """
    from recurrentgemma.jax.runtime.trees import set_path

    params: dict[str, Any] = {}
    for name, tensor in state_dict.items():
        path = flax_path(name.removeprefix(_LEVEL))
        set_path(params, path, to_torch(path, torch_tensor_to_jax_array(tensor)))
    return {"params": params}
