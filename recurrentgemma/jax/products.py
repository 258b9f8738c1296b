"""Products with stored matrices: the one way through which every layer multiplies.

`jax.quantization` makes the matrices that are in fewer bytes; `common.quantization` defines what
they mean.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Int8, Integer, Shaped

from recurrentgemma.common.quantization import LARGEST, Quantized, dequantize
from recurrentgemma.jax.runtime.promotion import default_promotion
from recurrentgemma.jax.scan.gates import wide_dtype

MANY_ROWS = 64
_OLD_XLA = jax.__version_info__ < (0, 11)  # a newer one packs int8 fast
_LARGE = 2**20  # values of a matrix


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """A matrix or a stack of matrices, kept as rows of outputs, [..., N, K].

    XLA multiplies fast on a CPU in this form alone: in bfloat16 a matrix [K, N] is first written
    out in float32.

    Attributes:
      values: [..., N, K].
      axis: The axis of inputs in the matrix that this stands for; see `Quantized`.
    """

    values: Any
    axis: int = -2

    # The matrix that this stands for has these.
    shape = property(lambda self: _matrix_shape(self.values.shape, self.axis))
    ndim = property(lambda self: self.values.ndim)
    dtype = property(lambda self: self.values.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Turned:
    """A table that is also held with its inputs first, which XLA multiplies in half the time.

    Attributes:
      values: [N, K].
      columns: The same values, [K, N].
    """

    values: Any
    columns: Any

    shape = property(lambda self: self.values.shape)
    ndim = property(lambda self: self.values.ndim)
    dtype = property(lambda self: self.values.dtype)


def _matrix_shape(stored: tuple[int, ...], axis: int) -> tuple[int, ...]:
    *stack, rows, inputs = stored
    return (*stack, rows, inputs) if axis == -1 else (*stack, inputs, rows)


@dataclasses.dataclass(frozen=True, eq=False)
class OnGPU(Quantized):
    """A quantised matrix on one GPU, where a kernel multiplies few rows with it as it is stored."""


class Adapted(NamedTuple):
    """A matrix W under a low-rank adapter, or a stack of them: W + A B.

    Attributes:
      base: W, [..., I, J].
      a: A times the adapter's scale, [..., I, rank].
      b: B, [..., rank, J].
    """

    base: Any
    a: Any
    b: Any

    shape = property(lambda self: self.base.shape)
    ndim = property(lambda self: self.base.ndim)
    dtype = property(lambda self: self.base.dtype)


Matrix = Array | Quantized | Rows | Turned | Adapted
STORED = Quantized, Rows, Turned, Adapted  # a matrix in another form than an array
for _kind in (Quantized, OnGPU):
    jax.tree_util.register_dataclass(
        _kind, ["values", "scale", "zero"], ["scheme", "axis", "dtype", "integer"]
    )
jax.tree_util.register_dataclass(Rows, ["values"], ["axis"])
jax.tree_util.register_dataclass(Turned, ["values", "columns"], [])
flax.serialization.register_serialization_state(
    Quantized,
    lambda quantized: {name or "values": part for name, part in quantized.parts.items()},
    lambda quantized, state: quantized.replace(
        values=state["values"], scale=state[".scale"], zero=state.get(".zero")
    ),
)


def promote_dtype(*values: Any, dtype: Dtype | None = None) -> list[Any]:
    """Matrices in one dtype: the one given, or that to which JAX promotes them."""
    found = [jnp.zeros((), v.dtype) if isinstance(v, STORED) else v for v in values]
    dtype = canonicalize_dtype(*found, dtype=dtype)

    def promoted(v: Any) -> Any:
        if isinstance(v, Quantized):
            return v.replace(dtype=jnp.dtype(dtype).name)
        if isinstance(v, Rows):
            return Rows(v.values.astype(dtype), v.axis)
        if isinstance(v, Turned):
            return Turned(v.values.astype(dtype), v.columns.astype(dtype))
        if isinstance(v, Adapted):
            return Adapted(*map(promoted, v))
        return jnp.asarray(v, dtype)

    return [promoted(v) for v in values]


def dense(w: Matrix) -> Array:
    """The array itself, or the matrix that another form stands for, in its dtype."""
    if isinstance(w, Quantized):
        return dequantize(w, jnp.stack).astype(w.dtype)
    if isinstance(w, Rows):
        return w.values if w.axis == -1 else w.values.swapaxes(-1, -2)
    if isinstance(w, Turned):
        return w.values
    if isinstance(w, Adapted):
        base = dense(w.base)
        return base + (w.a @ w.b).astype(base.dtype)
    return w


def lookup(w: Matrix, index: Integer[Array, "..."]) -> Shaped[Array, "... d"]:
    """The rows of a table."""
    if isinstance(w, Quantized):
        return dense(w.with_parts(lambda part: part[index]))
    return dense(w)[index]


def product(
    x: Float[Array, "*b k"],
    w: Matrix,
    bias: Array | None = None,
    *,
    axis: int = -2,
    dtype: Dtype | None = None,
) -> Float[Array, "*c n"]:
    """x W + b for a matrix, [K, N], or for each matrix of a stack, [C, K, N].

    A matrix takes any x, [..., K]. A stack takes rows for each of its matrices, [C, Z, K], or the
    same rows for all, [1, Z, K], and gives [C, Z, N].

    A `Quantized` whose `integer` is set is multiplied as it is stored where there is a way: `q8`
    quantises the rows of x. Any other is dequantised (see `common.quantization`).

    Args:
      x: The rows, in the dtype of the matrix (`promote_dtype`).
      w: The matrix or stack.
      bias: Added; it broadcasts to the result.
      axis: The axis of inputs of `w`: -2, or -1 where it is [..., N, K].
      dtype: The dtype in which products are summed, and of the result; that of x if None.
    """
    if isinstance(w, Adapted):
        y = product(x, w.base, bias, axis=axis, dtype=dtype)
        return y + product(product(x, w.a), w.b).astype(y.dtype)
    if isinstance(w, Quantized) and w.integer and _has_product(x, w):
        y = _as_stored(x, w).astype(dtype or x.dtype)
    elif isinstance(w, Rows):
        y = by_rows(x, w.values, wide_dtype(x.dtype)).astype(dtype or x.dtype)
    elif isinstance(w, Turned):
        y = _product(x, w.columns, -2, dtype)
    else:
        y = _product(x, dense(w), axis, dtype)
    return y if bias is None else y + bias


def _product(x: Array, w: Array, axis: int, dtype: Dtype | None) -> Array:
    w = w if axis == -2 else w.swapaxes(-1, -2)
    if w.ndim > 2 and len(x) == 1:
        # With few rows one batched product, since separate ones take copies of the matrices; with
        # many separate products, which are faster. jnp.einsum would copy the weight in both.
        if isinstance(x.shape[1], int) and x.shape[1] >= MANY_ROWS:  # not where it is symbolic
            return jnp.stack([jnp.matmul(x[0], part, preferred_element_type=dtype) for part in w])
        x = jnp.broadcast_to(x, (len(w), *x.shape[1:]))
    return jnp.matmul(x, w, preferred_element_type=dtype)


def _has_product(x: Array, w: Quantized) -> bool:
    """Whether x W has a way with the values in their own bits."""
    if not isinstance(w, OnGPU):
        return w.scheme == "q8"
    # Import late: Pallas takes a while to import, and other devices do not need it.
    from recurrentgemma.jax.runtime import pallas_products

    return pallas_products.fits(x, w)


@jax.custom_jvp
def _as_stored(x: Array, w: Quantized) -> Array:
    """x W in float32, with the values in their own bits."""
    if isinstance(w, OnGPU):
        from recurrentgemma.jax.runtime import pallas_products

        return pallas_products.product(x, w)
    values, scale = quantize_rows(x)
    sums = integer_sums(values, w.values).astype(jnp.float32)
    return sums * scale * w.scale.swapaxes(-1, -2)


@_as_stored.defjvp
def _slope(primals: tuple[Array, Quantized], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    """The derivative of the dequantised product, since rounding has no slope."""
    (x, w), (dx, _) = primals, tangents
    return _as_stored(x, w), _product(dx, dense(w).astype(dx.dtype), w.axis, jnp.float32)


def by_rows(
    x: Shaped[Array, "*b k"], rows: Shaped[Array, "*c n k"], dtype: Dtype
) -> Shaped[Array, "*d n"]:
    """The product of `product` in its fast form on a CPU, summed in a wide dtype.

    Args:
      x: The rows of one factor.
      rows: The other factor as rows of outputs, [N, K] or [C, N, K].
      dtype: The dtype of the sums: float32 or wider, or int32 for int8.
    """
    if rows.ndim > 2 and len(x) == 1:
        # One product, since a stack of them needs a copy of x for each.
        y_zm = by_rows(x[0], rows.reshape(-1, rows.shape[-1]), dtype)
        return y_zm.reshape(-1, *rows.shape[:-1]).swapaxes(0, 1)
    x_czk = x if rows.ndim > 2 else x.reshape(-1, x.shape[-1])
    count = x_czk.shape[-2]
    if count == 1 and x.dtype.itemsize < 4:  # one row alone takes XLA ten times as long as two
        x_czk = jnp.broadcast_to(x_czk, (*x_czk.shape[:-2], 2, x.shape[-1]))
    y_czn = jax.lax.platform_dependent(
        x_czk, rows, cpu=functools.partial(_on_cpu, dtype), default=functools.partial(_dot, dtype)
    )
    y_czn = y_czn[..., :count, :]
    return y_czn if rows.ndim > 2 else y_czn.reshape(*x.shape[:-1], len(rows))


def _dot(dtype: Dtype, x: Array, rows: Array) -> Array:
    """[..., Z, K] times [..., N, K] as [..., Z, N]."""
    stack = tuple(range(rows.ndim - 2))
    contracted = (x.ndim - 1,), (rows.ndim - 1,)
    return jax.lax.dot_general(x, rows, (contracted, (stack, stack)), None, dtype)


def _on_cpu(dtype: Dtype, x: Array, rows: Array) -> Array:
    """`_dot` with the matrix as the first factor, where that is faster.

    XLA packs the second factor anew for each product. Without the barrier it would change the
    factors back.
    """
    if not _gains_first(x.shape[-2], rows):
        return _dot(dtype, x, rows)
    return jax.lax.optimization_barrier(_dot(dtype, rows, x)).swapaxes(-1, -2)


def _gains_first(count: Any, rows: Array) -> bool:
    """Whether a matrix is faster as the first factor of a product with so many rows."""
    if not isinstance(count, int) or not 1 < count <= MANY_ROWS:  # it may be symbolic
        return False
    if rows.dtype.itemsize == 1:
        return _OLD_XLA
    if rows.dtype.itemsize == 2:
        return rows.ndim == 2 and (count >= 16 or (_OLD_XLA and rows.size >= _LARGE))
    return True


@default_promotion
def quantize_rows(x: Float[Array, "*b k"]) -> tuple[Int8[Array, "*b k"], Float[Array, "*b 1"]]:
    """See `common.quantization.quantize_rows`."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1, keepdims=True)
    inverse = LARGEST / jnp.where(largest > 0, largest, jnp.inf)
    return jnp.rint(x * inverse).astype(jnp.int8), largest * (1 / LARGEST)


def integer_sums(x: Int8[Array, "*b k"], values: Int8[Array, "*c n k"]) -> Int[Array, "*d n"]:
    """See `common.quantization.integer_sums`."""
    return by_rows(x, values, jnp.int32)
