"""The recurrences of the model, h_t = a_t * h_{t-1} + x_t: one entry, several implementations.

`linear_scan` is the recurrence itself; `rg_lru_scan` computes the gates too. Each is one
differentiable operation for every implementation. The backward pass is the adjoint recurrence; it
keeps the arguments and the output, and computes the gates again.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.presets import ScanChoice, ScanType
from recurrentgemma.torch.scan import ops as scan_ops
from recurrentgemma.torch.scan.gates import forward_levels, rg_lru_gates, wide_dtype

IMPLEMENTATIONS = ("auto", "reference", "native", "associative", "triton")
SCAN_TYPES = {
    ScanType.AUTO: "auto",
    ScanType.LINEAR_NATIVE: "native",
    ScanType.ASSOCIATIVE_NATIVE: "associative",
    ScanType.LINEAR_PALLAS: "auto",  # PyTorch has no Pallas
}
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def linear_scan(
    x: Float[Tensor, "b t d"],
    a: Float[Tensor, "b t d"],
    h0: Float[Tensor, "b d"] | None = None,
    reset: Bool[Tensor, "b t"] | None = None,
    *,
    reverse: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
    """h_t = a_t * h_{t-1} + x_t along axis 1, the state in float32 or wider.

    A reset removes the state, even an infinite state or NaN; but with "native", outside the CPU,
    a reset after the first step cannot remove such a state. A gradient that is not finite crosses a
    reset.

    Args:
      x: Inputs, [B, T, D].
      a: Decays, [B, T, D].
      h0: State before the first step, [B, D]; zeros if None.
      reset: Where to drop the state (a_t is 0 there), [B, T].
      reverse: Run from the last step to the first.
      implementation: "auto" (see `choose_implementation`), "reference" (a plain loop), "native"
        (chunks that advance together), "associative" (a logarithmic number of passes) or "triton"
        (GPU).

    Returns:
      All states in x's dtype, [B, T, D], and the last one visited in the state's dtype, [B, D].

    Raises:
      ValueError: Shapes, dtypes or devices differ, or the implementation is unknown or not for
        this device.
    """
    if x.ndim != 3 or x.shape != a.shape:
        raise UserError(
            f"x and a must have one shape [B, T, D], got {tuple(x.shape)} and {tuple(a.shape)}"
        )
    batch, length, width = x.shape
    _check(x, "x", x, x.shape)
    _check(x, "a", a, x.shape)
    if h0 is not None:
        _check(x, "h0", h0, (batch, width))
    if reset is not None:
        _check(x, "reset", reset, (batch, length), "a bool")
    implementation = _implementation(implementation, x)
    state = _initial_state(x, h0)
    if x.numel() == 0:
        return x.clone(), state.clone()
    if implementation not in _RECURRENCES:
        return scan_ops.linear_scan(x, a, state, reset, reverse, implementation)
    x_wide, a = x.to(state.dtype), a.to(state.dtype)
    y, last = _RECURRENCES[implementation](x_wide, a, state, reset, reverse)
    return y.to(x.dtype), last


def rg_lru_scan(
    x: Float[Tensor, "b t d"],
    input_gate: Float[Tensor, "b t d"],
    a_gate: Float[Tensor, "b t d"],
    a_param: Float[Tensor, "d"],
    segment_pos: Int[Tensor, "b t"],
    h0: Float[Tensor, "b d"] | None = None,
    *,
    implementation: str = "auto",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
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

    Returns:
      All states in x's dtype, [B, T, D], and the last one in the state's dtype, [B, D].

    Raises:
      ValueError: Shapes, dtypes or devices differ, or the implementation is unknown or not for
        this device.
    """
    if x.ndim != 3:
        raise UserError(f"x must have shape [B, T, D], got {tuple(x.shape)}")
    batch, _, width = x.shape
    _check(x, "x", x, x.shape)
    _check(x, "input_gate", input_gate, x.shape)
    _check(x, "a_gate", a_gate, x.shape)
    _check(x, "a_param", a_param, (width,))
    segment_pos = as_positions(segment_pos, x)
    if h0 is not None:
        _check(x, "h0", h0, (batch, width))
    implementation = _implementation(implementation, x)
    state = _initial_state(x, h0)
    if x.numel() == 0:
        return x.clone(), state.clone()
    a_param = a_param.to(state.dtype).expand(batch, width)
    if implementation not in _RECURRENCES:
        return scan_ops.rg_lru_scan(
            x, input_gate, a_gate, a_param, segment_pos, state, implementation
        )
    x_wide, input_gate, a_gate = (z.to(state.dtype) for z in (x, input_gate, a_gate))
    gated_x, a = rg_lru_gates(x_wide, input_gate, a_gate, a_param, segment_pos)
    y, last = _RECURRENCES[implementation](gated_x, a, state, segment_pos == 0, False)
    return y.to(x.dtype), last


def choose_implementation(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> ScanChoice:
    """The implementation that "auto" takes for tensors of this shape and dtype.

    Args:
      shape: [B, T, D].
      dtype: The dtype of x.
      device: A device; the default one if None.
    """
    del dtype  # each implementation takes any
    # Not `get_default_device`: in PyTorch 2.6 it fails after a default device was reset.
    kind = torch.empty(()).device.type if device is None else torch.device(device).type
    if kind == "cuda" and _HAS_TRITON:
        return ScanChoice("triton", "a kernel reads and writes each element once")
    if shape[1] == 1:
        return ScanChoice("reference", "a single step needs no kernel")
    if kind == "cuda":
        return ScanChoice("native", "triton is not installed")
    return ScanChoice("native", f"PyTorch's own operations are the fastest on {kind}")


def _implementation(name: str, x: Tensor) -> str:
    if name not in IMPLEMENTATIONS:
        raise UserError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {name!r}")
    if name == "auto":
        batch, length, width = x.shape
        name = choose_implementation((batch, length, width), x.dtype, x.device).name
    if name == "triton":
        if not _HAS_TRITON:
            raise UserError(
                "implementation 'triton' needs the package triton, which is not installed; "
                "without it there are reference, native, associative"
            )
        if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise UserError(
                f"implementation 'triton' runs on cuda, got {x.device.type}, which runs "
                "reference, native, associative"
            )
    if name not in _RECURRENCES and (forward_levels() > 1 or torch.onnx.is_in_onnx_export()):
        return "associative"  # PyTorch's own operations, which have every derivative, and ONNX has
    return name


def _check(
    x: Tensor, name: str, value: Tensor, shape: tuple[int, ...], kind: str = "a floating"
) -> None:
    """Raises if `value` does not fit x."""
    if value.shape != shape:
        raise UserError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != x.device:
        raise UserError(f"{name} must be on {x.device} like x, got {value.device}")
    is_bool, is_float = value.dtype == torch.bool, value.is_floating_point()
    is_integer = not (is_bool or is_float or value.is_complex())
    kinds = {"a floating": is_float, "a bool": is_bool, "an integer": is_integer}
    if not kinds[kind]:
        raise UserError(f"{name} must be of {kind} dtype, got {value.dtype}")


def as_positions(segment_pos: Tensor, x: Tensor) -> Tensor:
    """The positions of x's steps, [B, T], in a dtype that does not overflow.

    Raises:
      ValueError: They are not integers, or their shape or device does not fit x.
    """
    fits = segment_pos.shape == x.shape[:2] and segment_pos.device == x.device
    if fits and segment_pos.dtype in (torch.int32, torch.int64):
        return segment_pos
    _check(x, "segment_pos", segment_pos, x.shape[:2], "an integer")
    return segment_pos.long()


def _initial_state(x: Tensor, h0: Tensor | None) -> Tensor:
    batch, _, width = x.shape
    wide = wide_dtype(x.dtype)
    return x.new_zeros(batch, width, dtype=wide) if h0 is None else h0.to(wide)


def _loop(
    x: Tensor, a: Tensor, state: Tensor, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The definition."""
    outputs = []
    for t in range(x.shape[1])[:: -1 if reverse else 1]:
        if reset is not None:
            state = state.masked_fill(reset[:, t, None], 0)
        state = torch.addcmul(x[:, t], a[:, t], state)
        outputs.append(state)
    return torch.stack(outputs[::-1] if reverse else outputs, 1), state


def _associative(
    x: Tensor, a: Tensor, state: Tensor, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """In pass n, each step adds the decayed result of the step 2^n before it."""
    forgets = x.new_zeros(x.shape[:2], dtype=torch.bool) if reset is None else reset
    if reverse:
        x, a, forgets = x.flip(1), a.flip(1), forgets.flip(1)
    first = x[:, 0] + a[:, 0] * state.masked_fill(forgets[:, :1], 0)
    y = torch.cat([first[:, None], x[:, 1:]], 1)
    distance = 1
    while distance < x.shape[1]:
        place = (0, 0, distance, 0)
        y = y + a * pad(y[:, :-distance], place).masked_fill(forgets[..., None], 0)
        a = a * pad(a[:, :-distance], place, value=1.0)
        forgets = forgets | pad(forgets[:, :-distance], (distance, 0))
        distance *= 2
    return y.flip(1) if reverse else y, y[:, -1].clone(memory_format=torch.contiguous_format)


_RECURRENCES = {"reference": _loop, "associative": _associative}
