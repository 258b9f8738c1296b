"""The scan and the RG-LRU's small functions under their published names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.init import RingLog
from recurrentgemma.common.model.presets import ScanType
from recurrentgemma.jax.scan.dispatch import SCAN_TYPES, choose_implementation, linear_scan

_States = tuple[Float[Array, "b t d"], Float[Array, "b d"]]


def resolve_scan_type(scan_type: ScanType) -> ScanType:
    """The scan type; in place of AUTO the one that long sequences take on the default device."""
    if scan_type is not ScanType.AUTO:
        return scan_type
    name = choose_implementation((1, 2048, 128), jnp.float32).name
    return next((kind for kind, known in SCAN_TYPES.items() if known == name), ScanType.AUTO)


def single_shard_rnn_scan(
    x: Float[Array, "b t d"],
    a: Float[Array, "b t d"],
    h0: Float[Array, "b d"] | None = None,
    reverse: bool = False,
    scan_type: ScanType = ScanType.AUTO,
    acc_float_dtype: Dtype = jnp.float32,
    seq_axis: str | None = None,
    **tuning: Any,
) -> _States:
    """`linear_scan` on one device; `tuning` (block sizes, unrolling) chooses nothing here.

    Raises:
      ValueError: A sequence axis is given, or states are to be narrower than float32.
    """
    if seq_axis is not None or jnp.dtype(acc_float_dtype).itemsize < 4:
        raise UserError(
            "a scan on one device takes no seq_axis and accumulates in float32 or wider, "
            f"got {seq_axis=} {acc_float_dtype=}"
        )
    del tuning
    return linear_scan(x, a, h0, reverse=reverse, implementation=SCAN_TYPES[scan_type])


def lru_linear_scan(x, a, h0=None, reverse=False, return_a_prod=False, **tuning) -> Any:
    """The recurrence, one step after the other; with `return_a_prod` its products of a, too."""
    return _with_products(ScanType.LINEAR_NATIVE, x, a, h0, reverse, return_a_prod, tuning)


def lru_associative_scan(x, a, h0=None, reverse=False, return_a_prod=False, **tuning) -> Any:
    """The recurrence in a logarithmic number of passes; see `lru_linear_scan`."""
    return _with_products(ScanType.ASSOCIATIVE_NATIVE, x, a, h0, reverse, return_a_prod, tuning)


def _with_products(scan_type, x, a, h0, reverse, return_a_prod, tuning) -> Any:
    states = single_shard_rnn_scan(x, a, h0, reverse, scan_type, **tuning)
    if not return_a_prod:
        return states
    # A state that starts at 1 and takes in nothing is the product of the decays.
    ones = jnp.ones_like(x[:, 0], jnp.promote_types(x.dtype, jnp.float32))
    return states, single_shard_rnn_scan(jnp.zeros_like(x), a, ones, reverse, scan_type, **tuning)


def rnn_real_param_init(
    min_rad: float, max_rad: float, transform: str = "softplus", eps: float = 1e-8
) -> Any:
    """An initialiser for `a_param`: exp(-softplus(a_param)) is uniform on a ring of the unit disk.

    Raises:
      ValueError: The transform is not "softplus".
    """
    if transform != "softplus":
        raise UserError(f"transform must be 'softplus', got {transform!r}")
    del eps
    ring = RingLog(min_rad, max_rad)

    def init(key, shape, dtype=jnp.float32):
        return ring.from_uniform(jax.random.uniform(key, shape), jnp).astype(dtype)

    return init


def stable_sqrt_fwd(x: Array, _: Any) -> tuple[Array, tuple[Array]]:
    """The forward rule of a square root whose gradient is bounded."""
    return jnp.sqrt(x), (x,)


def stable_sqrt_bwd(max_gradient: float, res: tuple[Array], g: Array) -> tuple[Array]:
    """The backward rule of a square root whose gradient is at most `max_gradient`."""
    slope = 0.5 / jnp.sqrt(jnp.maximum(res[0], (0.5 / max_gradient) ** 2))
    return (g * slope,)
