"""The recurrences of the model, h_t = a_t * h_{t-1} + x_t: one entry, several implementations.

`linear_scan` is the recurrence itself; `rg_lru_scan` computes the gates too. Each is one
differentiable operation for every implementation and every split over devices, in both modes and
any number of times. The backward pass is the adjoint recurrence; it keeps the arguments and the
output, and computes the gates again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax import core, lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.numerics import RG_LRU_C
from recurrentgemma.common.model.presets import ScanChoice, ScanType
from recurrentgemma.jax.runtime.axes import automatic, partition
from recurrentgemma.jax.runtime.promotion import default_promotion
from recurrentgemma.jax.runtime.targets import (
    TRITON,
    Target,
    default_platform,
    given_target,
    pallas_lowers,
)
from recurrentgemma.jax.scan import xla as scan_xla
from recurrentgemma.jax.scan.gates import LINEAR, RG_LRU, Gates, Inputs, Scan, wide_dtype
from recurrentgemma.jax.scan.split import split
from recurrentgemma.jax.scan.tangents import Linear, linear
from recurrentgemma.jax.scan.xla import Recurrence, XLAScan
from recurrentgemma.jax.sharding import ShardingSpec

IMPLEMENTATIONS = ("auto", "reference", "xla", "associative", "pallas")
SCAN_TYPES = {
    ScanType.AUTO: "auto",
    ScanType.LINEAR_NATIVE: "xla",
    ScanType.ASSOCIATIVE_NATIVE: "associative",
    ScanType.LINEAR_PALLAS: "pallas",
}
_XLA: dict[str, Scan] = {
    "reference": scan_xla.REFERENCE,
    "xla": scan_xla.IN_PLACE,
    "associative": scan_xla.ASSOCIATIVE,
}
_FEW_STEPS = scan_xla.UNROLLED_STEPS
_PALLAS_PLATFORMS = ("tpu", "gpu")
_PALLAS_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


@default_promotion
def linear_scan(
    x: Float[Array, "b t d"] | np.ndarray,
    a: Float[Array, "b t d"] | np.ndarray,
    h0: Float[Array, "b d"] | np.ndarray | None = None,
    reset: Bool[Array, "b t"] | np.ndarray | None = None,
    *,
    reverse: bool = False,
    implementation: str = "auto",
    scan_type: ScanType | None = None,
    sharding_spec: ShardingSpec | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
    """h_t = a_t * h_{t-1} + x_t along axis 1, the state in float32 or wider.

    A reset removes the state, even an infinite state or NaN. A gradient that is not finite crosses
    a reset.

    Args:
      x: Inputs, [B, T, D].
      a: Decays, [B, T, D].
      h0: State before the first step, [B, D]; zeros if None.
      reset: Where to drop the state (a_t is 0 there), [B, T].
      reverse: Run from the last step to the first.
      implementation: "auto" (see `choose_implementation`), "reference" (`lax.scan`), "xla" (an
        in-place loop), "associative" or "pallas" (TPU and GPU).
      scan_type: The same choice as published; it goes before `implementation`.
      sharding_spec: How the arrays are split over devices, if they are.

    Returns:
      All states in x's dtype, [B, T, D], and the last one visited in the state's dtype, [B, D].

    Raises:
      ValueError: A shape or dtype is wrong, or the implementation is unknown or not for this
        device or dtype.
    """
    x, a = jnp.asarray(x), jnp.asarray(a)
    h0 = None if h0 is None else jnp.asarray(h0)
    reset = None if reset is None else jnp.asarray(reset)
    if x.ndim != 3 or x.shape != a.shape:
        raise UserError(f"x and a must have one shape [B, T, D], got {x.shape} and {a.shape}")
    _check("a", a, x.shape)
    if reset is not None:
        _check("reset", reset, x.shape[:2], "a bool")
    position = None if reset is None else 1 - reset.astype(jnp.int32)
    inputs = Inputs(x, (a,), (), position)
    implementation = SCAN_TYPES[scan_type] if scan_type is not None else implementation
    return _run(LINEAR, inputs, h0, reverse, implementation, sharding_spec)


@default_promotion
def rg_lru_scan(
    x: Float[Array, "b t d"] | np.ndarray,
    input_gate: Float[Array, "b t d"] | np.ndarray,
    a_gate: Float[Array, "b t d"] | np.ndarray,
    a_param: Float[Array, "d"] | np.ndarray,
    segment_pos: Int[Array, "b t"] | np.ndarray,
    h0: Float[Array, "b d"] | np.ndarray | None = None,
    *,
    implementation: str = "auto",
    sharding_spec: ShardingSpec | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
    """h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * sigmoid(input_gate_t) * x_t (arXiv 2402.19427, 2.4).

    log a_t = -8 * sigmoid(a_gate_t) * softplus(a_param). Where a document starts, the state is
    dropped, as in `linear_scan`, and the square root is 1; padding changes nothing. The arithmetic
    is float32, or float64 for float64 inputs; the gradient of the square root is clipped at 1000.

    Args:
      x: Inputs, [B, T, D].
      input_gate: The input gate before the sigmoid, [B, T, D].
      a_gate: The recurrence gate before the sigmoid, [B, T, D].
      a_param: [D].
      segment_pos: Position in the document, 0 at its start, -1 at padding, [B, T].
      h0: State before the first step, [B, D]; zeros if None.
      implementation: See `linear_scan`.
      sharding_spec: See `linear_scan`.

    Returns:
      All states in x's dtype, [B, T, D], and the last one in the state's dtype, [B, D].

    Raises:
      ValueError: A shape or dtype is wrong, or the implementation is unknown or not for this
        device or dtype.
    """
    x, input_gate, a_gate = jnp.asarray(x), jnp.asarray(input_gate), jnp.asarray(a_gate)
    a_param, segment_pos = jnp.asarray(a_param), jnp.asarray(segment_pos)
    h0 = None if h0 is None else jnp.asarray(h0)
    if x.ndim != 3:
        raise UserError(f"x must have shape [B, T, D], got {x.shape}")
    _check("input_gate", input_gate, x.shape)
    _check("a_gate", a_gate, x.shape)
    _check("a_param", a_param, x.shape[2:])
    segment_pos = as_positions(segment_pos, x)
    rate = -RG_LRU_C * jax.nn.softplus(a_param.astype(wide_dtype(x.dtype)))
    inputs = Inputs(x, (input_gate, a_gate), (rate,), segment_pos)
    return _run(RG_LRU, inputs, h0, False, implementation, sharding_spec)


def choose_implementation(
    shape: tuple[int, int, int],
    dtype: Dtype,
    device: jax.Device | str | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> ScanChoice:
    """The implementation that "auto" takes for arrays of this shape and dtype.

    Args:
      shape: [B, T, D].
      dtype: The dtype of x.
      device: A device or a platform ("cpu", "gpu", "tpu"); the default one if None.
    """
    platform = default_platform() if device is None else getattr(device, "platform", device)
    _, length, _ = shape
    if length <= _FEW_STEPS:
        return ScanChoice(
            "reference", f"{length} of at most {_FEW_STEPS} steps fuse without a loop"
        )
    if platform == "cpu":
        return ScanChoice("xla", "a loop in place reads and writes each element once")
    if platform not in _PALLAS_PLATFORMS or jnp.dtype(dtype) not in _PALLAS_DTYPES:
        return ScanChoice("associative", f"no kernel for {jnp.dtype(dtype)} on {platform}")
    if not pallas_lowers(platform):
        return ScanChoice("associative", f"JAX {jax.__version__} has no {TRITON}")
    return ScanChoice("pallas", f"a {platform} kernel reads and writes each element once")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _scan(
    scan: Scan, gates: Gates, reverse: bool, inputs: Inputs, h0: Array
) -> tuple[Array, Array]:
    return scan.forward(gates, inputs, h0, reverse)


@_scan.defjvp
@default_promotion
def _scan_jvp(scan: Scan, gates: Gates, reverse: bool, primals: Any, tangents: Any):
    inputs, h0 = primals
    y, last = _scan(scan, gates, reverse, inputs, h0)
    # The residuals are what the derivative depends on.
    residuals = inputs if gates.needs_x else inputs._replace(x=None), h0, y
    dinputs, dh0 = tangents
    functions = _derivative(scan, gates, reverse), _adjoint(scan, gates, reverse)
    return (y, last), linear(*functions, residuals, (*dinputs[:3], dh0))


def _derivative(scan: Scan, gates: Gates, reverse: bool) -> Linear:
    """From the tangents of the inputs and of h0 to those of all states and of the last."""

    def run(residuals, tangents):
        inputs, h0, y = _with_x(residuals)
        (dx, dsequences, dchannels), dh0 = tangents[:3], tangents[3]
        dinputs = Inputs(dx, dsequences, dchannels, None)
        return XLAScan(_recurrence(scan)).tangents(gates, inputs, h0, y, dinputs, dh0, reverse)

    run = default_promotion(run)
    return Linear(run, run, lambda r, _: (r[2], r[1]), _is_interpreted(scan))


def _adjoint(scan: Scan, gates: Gates, reverse: bool) -> Linear:
    """The transpose of `_derivative`: the backward pass."""

    def backward(scan, residuals, gradients):
        dinputs, dh0 = scan.backward(gates, *_with_x(residuals), *gradients, reverse)
        return *dinputs[:3], dh0

    def like(residuals, _):
        inputs, h0, y = residuals
        return y, inputs.sequences, inputs.channels, h0

    each = scan, XLAScan(_recurrence(scan))
    run, derivable = (default_promotion(functools.partial(backward, scan)) for scan in each)
    return Linear(run, derivable, like, _is_interpreted(scan))


def _is_interpreted(scan: Scan) -> bool:
    return bool(getattr(scan, "interpret", False))


def _with_x(residuals: Any) -> tuple[Inputs, Array, Array]:
    """The residuals, in place of an x that nothing depends on anything of its shape."""
    inputs, h0, y = residuals
    return inputs if inputs.x is not None else inputs._replace(x=y), h0, y


def _recurrence(scan: Scan) -> Recurrence:
    """The recurrence of `XLAScan`, by another implementation, as a differentiable operation."""

    def run(x: Array, a: Array, state: Array, reverse: bool, adjoint: bool):
        first, last = (-1, 0) if reverse else (0, -1)
        decay = jnp.roll(a, -1 if reverse else 1, 1).at[:, first].set(1) if adjoint else a
        out, _ = _scan(scan, LINEAR, reverse, Inputs(x, (decay,), (), None), state)
        return out, a[:, last] * out[:, last] if adjoint else out[:, last]

    return run


_KINDS = {"a floating": jnp.floating, "a bool": jnp.bool_, "an integer": jnp.integer}


def _check(name: str, value: Array, shape: tuple[int, ...], kind: str = "a floating") -> None:
    """Raises if a recurrence cannot take a value."""
    if value.shape != shape:
        raise UserError(f"{name} must have shape {shape}, got {value.shape}")
    if not jnp.issubdtype(value.dtype, _KINDS[kind]):
        raise UserError(f"{name} must be of {kind} dtype, got {value.dtype}")


def as_positions(segment_pos: Array, x: Array) -> Array:
    """The positions of x's steps, [B, T], in a dtype that does not overflow.

    Raises:
      ValueError: They are not integers, or their shape is not [B, T].
    """
    _check("segment_pos", segment_pos, x.shape[:2], "an integer")
    return segment_pos.astype(jnp.int32)


def _run(
    gates: Gates,
    inputs: Inputs,
    h0: Array | None,
    reverse: bool,
    implementation: str,
    spec: ShardingSpec | None,
) -> tuple[Array, Array]:
    batch, length, width = shape = inputs.x.shape
    _check("x", inputs.x, shape)
    if h0 is not None:
        _check("h0", h0, (batch, width))
    dtype = inputs.x.dtype
    wide = wide_dtype(dtype)
    scan = _implementation(implementation, shape, dtype, _device(inputs.x, spec))
    h0 = jnp.zeros((batch, width), wide) if h0 is None else h0.astype(wide)
    if batch * length * width == 0:
        return inputs.x, h0

    def run(scan: Scan, inputs: Inputs, h0: Array) -> tuple[Array, Array]:
        return _scan(scan, gates, reverse, *_varying_alike(inputs, h0))

    def split_or_whole(inputs: Inputs, h0: Array) -> tuple[Array, Array]:
        return run(scan, inputs, h0) if spec is None else split(run, scan, spec, inputs, h0)

    rows, steps, channels = partition(inputs.x)
    partitions = PartitionSpec(rows, steps, channels), PartitionSpec(rows, channels)
    return automatic(split_or_whole, lambda _: partitions, inputs, h0)


def _varying_alike(inputs: Inputs, h0: Array) -> tuple[Inputs, Array]:
    """Marks all arrays as varying over each axis of `jax.shard_map` that any of them varies over.

    It stands outside the custom derivative, since its own derivative sums gradients over devices.
    """

    def axes(z: Array) -> frozenset[str]:
        kind: Any = jax.typeof(z)
        return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # since 0.10

    every = frozenset().union(*map(axes, jax.tree.leaves((inputs, h0))))
    return jax.tree.map(
        lambda z: lax.pcast(z, tuple(sorted(every - axes(z))), to="varying"), (inputs, h0)
    )


def _device(x: Array, spec: ShardingSpec | None) -> Target:
    """Where the computation will run, as far as tracing can tell."""
    target = given_target()
    if target is not None:
        return target
    if spec is not None and spec.mesh is not None:
        return Target(spec.mesh.devices.flat[0].platform)
    if not isinstance(x, core.Tracer):
        return Target(next(iter(x.devices())).platform)
    return Target(default_platform())


def _implementation(name: str, shape: tuple[int, int, int], dtype: Dtype, target: Target) -> Scan:
    if name not in IMPLEMENTATIONS:
        raise UserError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {name!r}")
    if name == "auto":
        name = choose_implementation(shape, dtype, target.platform).name
    if name != "pallas":
        return _XLA[name]
    if target.platform not in _PALLAS_PLATFORMS:
        raise UserError(
            f"implementation 'pallas' runs on {' and '.join(_PALLAS_PLATFORMS)}, got "
            f"{target.platform}, which runs {', '.join(_XLA)}"
        )
    if jnp.dtype(dtype) not in _PALLAS_DTYPES:
        raise UserError(
            "implementation 'pallas' takes float32 and bfloat16, got "
            f"{jnp.dtype(dtype)}, which {', '.join(_XLA)} take"
        )
    if not pallas_lowers(target.platform):
        raise UserError(
            f"implementation 'pallas' on {target.platform} needs {TRITON}, which JAX "
            f"{jax.__version__} does not have: install a version that does, such as 0.12, or ask "
            f"for auto or one of {', '.join(_XLA)}"
        )
    # Import late: Pallas takes a while to import, and the CPU does not need it.
    if target.platform == "tpu":
        from recurrentgemma.jax.scan.pallas_tpu import PallasTPUScan

        return PallasTPUScan(target.interpret)
    from recurrentgemma.jax.scan.pallas_gpu import PallasGPUScan

    return PallasGPUScan(target.interpret)
