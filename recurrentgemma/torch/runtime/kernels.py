"""Products on a CPU by private operators of PyTorch, of matrices quantised, float32 or bfloat16.

An operator is looked up by its name, and its results are compared with exact ones before it is
used; where it is missing or wrong, callers take a slower way. Some operators want the values in a
layout of their own, from which the values can be read back: so no matrix is held twice.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from recurrentgemma.common import quantization

_MANY = 64  # rows
_FEW = 8  # rows
_LEAST8 = 2**19  # values of a matrix of 8 bits; with fewer, a call takes longer than the product
_GROUPS = (32, 64, 128, 256)  # of inputs, for which there is a kernel of 4 bits
_OUTPUTS = 64  # divide the number of outputs in that kernel's layout
_PART = 2**18  # values that are packed or dequantised at a time: they stay in the cache


def plain_sums8(x: Tensor, values: Tensor) -> Tensor:
    """The int32 sums of int8 rows, [M, K], with values as they are stored, [N, K]."""
    if len(x) > _MANY:
        return torch._int_mm(x, values.t())  # pyright: ignore[reportPrivateImportUsage]
    # Rows as columns: in up to half the time.
    return torch._int_mm(values, x.t()).t()  # pyright: ignore[reportPrivateImportUsage]


def takes8(values: Tensor) -> bool:
    """Whether `product8` works, and gains with such a matrix or stack."""
    large = values.shape[-2] * values.shape[-1] >= _LEAST8
    return large and values.is_cpu and packed8_works()


def pack8(values: Tensor) -> list[Sequence[Tensor]]:
    """The matrices of a stack, [C, N, K], as `product8` takes them: with scales and zero points."""
    ones = torch.ones(values.shape[1], device="cpu")
    zeros = torch.zeros(values.shape[1], dtype=torch.int32, device="cpu")
    return [(torch.ops.onednn.qlinear_prepack(part, None), ones, zeros) for part in values]


def unpack8(packed: Sequence[Tensor]) -> Tensor:
    """The values of `pack8` as they are stored."""
    return packed[0].to_dense().t().contiguous()


def shifted8(x: Tensor) -> Tensor:
    """int8 rows as `product8` takes them: the instructions want one factor unsigned."""
    return x.contiguous().view(torch.uint8) ^ 128


def product8(shifted: Tensor, packed: Sequence[Tensor]) -> Tensor:
    """The sums of `plain_sums8` as float32 rounds them.

    Args:
      shifted: The rows as `shifted8` makes them, [M, K].
      packed: A matrix that `pack8` made.
    """
    places = shifted, 1.0, 128, *packed, None, 1.0, 0, torch.float32
    return torch.ops.onednn.qlinear_pointwise(*places, "none", [], "")


def pack(values: Tensor) -> Tensor:
    """Values, [N, K], in oneDNN's layout for a few rows, which serves any number."""
    return torch.ops.mkldnn._reorder_linear_weight(values.contiguous(), _FEW)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return packed.to_dense()


def product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W + b of rows, [..., K], with values of their dtype, [N, K], packed or in any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")


def takes4(values: Tensor, scale: Tensor) -> bool:
    """Whether `product4` works, and takes matrices with such values and scales."""
    outputs, groups = scale.shape[-2:]
    fits = 2 * values.shape[-1] // groups in _GROUPS and outputs % _OUTPUTS == 0
    return fits and values.is_cpu and packed4_works()


def pack4(values: Tensor, scale: Tensor, zero: Tensor) -> list[Sequence[Tensor]]:
    """The matrices of a stack as `product4` takes them: values in its layout, scales with zeros.

    The kernel computes (value - 8) s + z in bfloat16.

    Args:
      values: As they are stored, [C, N, K / 2].
      scale: [C, N, G].
      zero: [C, N, G].
    """
    # In parts, into one tensor as large as the one that it replaces: memory stays whole.
    packed = torch.empty_like(values)
    rows, into = (z.flatten(0, 1).split(_part4(2 * z.shape[-1])) for z in (values, packed))
    for part, out in zip(rows, into, strict=True):
        out.copy_(_layout4(quantization.unpack(part, torch.stack)))
    pairs = torch.stack([scale, scale * (8 - zero.float())], -1)
    pairs = pairs.transpose(1, 2).bfloat16().contiguous()
    return [*zip(packed, pairs, strict=True)]


def unpack4(packed: Sequence[Tensor]) -> Tensor:
    """The values of `pack4` as they are stored."""
    return quantization.pack(_values4(packed[0]))


def _part4(inputs: int) -> int:
    """The outputs of a part of a matrix: whole blocks of the layout."""
    return max(_PART // inputs // _OUTPUTS, 1) * _OUTPUTS


def _layout4(values: Tensor) -> Tensor:
    """4-bit values, one a byte, [N, K], in the layout of PyTorch's kernel, [N, K / 2]."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int(), 1)


def _values4(packed: Tensor) -> Tensor:
    """The inverse of `_layout4`, of a whole number of blocks of outputs."""
    outputs, half = packed.shape
    size, order = _block4()
    lanes = packed.view(outputs // size, 2 * half, size // 2).mT.contiguous()
    values = torch.stack([lanes & 15, lanes >> 4], 1).view(-1, size, 2 * half)
    return (values if order is None else values[:, order]).view(outputs, 2 * half)


@functools.cache
def _block4() -> tuple[int, Tensor | None]:
    """The outputs of a block of the layout, which keeps them together input by input.

    And where each is in the order of lower halves, then upper halves; None if they are in order.
    """
    inputs = 32
    numbers = torch.arange(_OUTPUTS, dtype=torch.uint8, device="cpu")[:, None].expand(-1, inputs)
    lower, upper = (_layout4(digit).flatten() for digit in (numbers & 15, numbers >> 4))
    halves = [lower & 15 | (upper & 15) << 4, lower >> 4 | upper >> 4 << 4]
    for size in (_OUTPUTS, _OUTPUTS // 2, _OUTPUTS // 4):
        blocks = torch.cat([half.view(-1, inputs, size // 2) for half in halves], -1)
        if (blocks == blocks[:, :1]).all() and (blocks[0] < size).all():
            order = blocks[0, 0].long().argsort()
            return size, None if torch.equal(order, order.sort().values) else order
    raise NotImplementedError("no such layout is known")


def product4(x: Tensor, packed: Sequence[Tensor]) -> Tensor:
    """x W of rows in bfloat16, [M, K], with a matrix that `pack4` made."""
    values, scales = packed
    group = x.shape[1] // len(scales)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), values, group, scales)


def dense4(packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The matrix in float32, [N, K], from values in the layout and scales and zeros, [N, G]."""
    groups = _values4(packed).float().view(*scale.shape, -1)
    return groups.sub_(zero[..., None]).mul_(scale[..., None]).flatten(1)


def wide_product4(x: Tensor, matrix: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """x W of rows in their own dtype, with what `dense4` takes: a part of it at a time."""
    parts = zip(*(array.split(_part4(x.shape[1])) for array in matrix), strict=True)
    multiply = product if x.dtype == torch.float32 and plain32_gains() else linear
    return torch.cat([multiply(x, dense4(*part).to(x.dtype)) for part in parts], -1)


def works(check: Callable[[], bool]) -> Callable[[], bool]:
    """Whether a check holds, found once; an operator that is missing or refuses does not work."""
    found: list[bool] = []  # not `functools.cache`, of which `torch.compile` warns

    def works() -> bool:
        if not found:
            try:
                with torch.no_grad(), torch.device("cpu"):
                    found.append(check())
            except (AttributeError, NotImplementedError, RuntimeError, TypeError):
                found.append(False)
        return found[0]

    # As `torch.compiler.assume_constant_result` does, which takes a second to import.
    vars(works)["_dynamo_marked_constant"] = True
    return works


def extremes(rows: int, inputs: int) -> Tensor:
    """int8 rows with the largest sums, at which narrow instructions would overflow."""
    generator = torch.Generator("cpu").manual_seed(0)
    some = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8, generator=generator)
    some[0], some[-1] = 127, -127
    return some


def _exact(x: Tensor, values: Tensor, sums: Callable[[Tensor], Tensor]) -> bool:
    wanted = (x.double() @ values.double().t()).float()
    return all(torch.equal(sums(x[:rows]).float(), wanted[:rows]) for rows in (1, len(x)))


@works
def plain8_works() -> bool:
    """Whether `plain_sums8` is exact."""
    x, values = extremes(_MANY + 1, 320), extremes(48, 320)
    return _exact(x, values, lambda rows: plain_sums8(rows, values))


@works
def packed8_works() -> bool:
    """Whether `product8` is exact."""
    x, values = extremes(_MANY + 1, 4096), extremes(48, 4096)
    (packed,) = pack8(values[None])
    kept = torch.equal(unpack8(packed), values)
    return kept and _exact(x, values, lambda rows: product8(shifted8(rows), packed))


@works
def packed32_works() -> bool:
    """Whether `product` with packed values is as exact as float32."""
    return _packs(torch.float32)


@works
def packed16_gains() -> bool:
    """Whether `product` with packed values in bfloat16 is as exact as that, and the fastest.

    It is on CPUs of other vendors than Intel that have instructions for bfloat16: a call with
    values as they are packs them first, and a matrix whose inputs lie apart takes four times as
    long. Intel's, which may multiply tiles, keep what is measured there.
    """
    return not _is_from_intel() and _packs(torch.bfloat16)


@works
def plain32_gains() -> bool:
    """Whether `product` with values as they are is faster than `linear`, and as exact.

    It is on x86 CPUs of other vendors than Intel: `linear` is MKL's, which there reads a matrix for
    one row in a single thread, and computes without the widest instructions.
    """
    w = extremes(48, 320) / 127
    found = torch.backends.mkl.is_available() and not _is_from_intel()
    return found and _is_near(w, w) and _is_near(w, w.t().contiguous().t())


def _packs(dtype: torch.dtype) -> bool:
    """Whether products with packed values of a dtype are right, and the values can be read back."""
    w = (extremes(48, 320) / 127).to(dtype)
    packed = pack(w)
    return _is_near(w, packed) and torch.equal(unpack(packed), w)


def _is_near(w: Tensor, held: Tensor) -> bool:
    """Whether products with a matrix as it is held are as exact as sums in float32, rounded."""
    x = (extremes(17, 320) / 127).to(w.dtype)
    wanted, bound = x.double() @ w.double().t(), 2**-20 * (x.double().abs() @ w.double().abs().t())
    bound += 0 if w.dtype == torch.float32 else torch.finfo(w.dtype).eps * wanted.abs()
    errors = ((rows, (product(x[:rows], held) - wanted[:rows]).abs()) for rows in (1, len(x)))
    return all((error <= bound[:rows]).all() for rows, error in errors)


def _is_from_intel() -> bool:
    """Whether the CPU is Intel's; where nothing says so, it counts as theirs."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        text = platform.processor()
    return "AuthenticAMD" not in text and "HygonGenuine" not in text


@works
def packed4_works() -> bool:
    """Whether `product4` is as exact as bfloat16."""
    outputs = 2 * _OUTPUTS
    values = (extremes(outputs, 256) & 15).to(torch.uint8)
    scale = torch.arange(1, 2 * outputs + 1).view(outputs, 2) / 256  # exact in bfloat16
    zero = (extremes(outputs, 2) & 15).to(torch.int8)
    groups = (values.view(outputs, 2, 128).float() - zero[..., None]) * scale[..., None]
    stored, x = quantization.pack(values), extremes(5, 256).bfloat16()
    (packed,) = pack4(stored[None], scale[None], zero[None])
    wanted = x.float() @ groups.flatten(1).t()
    error = (product4(x, packed).float() - wanted).abs().max()
    kept = torch.equal(unpack4(packed), stored)
    return kept and bool(error <= 2**-7 * wanted.abs().max())


@works
def bfloat16_row_works() -> bool:
    """Whether the product with a vector in bfloat16 adds in float32, as `linear` does, and gains.

    It gains on Intel's CPUs; elsewhere `linear` takes less time.
    """
    if packed16_gains():
        return False
    w = extremes(9, 4096).bfloat16()
    x = torch.linspace(-1, 1, 4096).bfloat16()
    wanted, error = w.float() @ x.float(), 2**-8 * (w.float().abs() @ x.float().abs()) / 64
    return bool(((w @ x).float() - wanted).abs().sub(2**-8 * wanted.abs()).le(error).all())
