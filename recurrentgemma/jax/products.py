"""Products with stored matrices: the one way through which every layer multiplies.

`jax.quantization` makes the matrices that are in fewer bytes; `common.quantization` defines what
they mean.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Int8, Integer, Shaped

from recurrentgemma.common.quantization import Quantized, dequantize
from recurrentgemma.jax.runtime.promotion import default_promotion

MANY_ROWS = 64
_W = TypeVar("_W", bound=Array | Quantized)

jax.tree_util.register_dataclass(
    Quantized, ["values", "scale", "zero"], ["scheme", "axis", "dtype", "integer"]
)


def promote_dtype(*values: Any, dtype: Dtype | None = None) -> list[Any]:
    """Arrays and `Quantized` in one dtype: the one given, or that to which JAX promotes them."""
    found = [jnp.zeros((), v.dtype) if isinstance(v, Quantized) else v for v in values]
    dtype = canonicalize_dtype(*found, dtype=dtype)
    return [
        v.replace(dtype=jnp.dtype(dtype).name)
        if isinstance(v, Quantized)
        else jnp.asarray(v, dtype)
        for v in values
    ]


def dense(w: Array | Quantized) -> Array:
    """The array itself, or the matrix that a `Quantized` stands for, in its dtype."""
    return dequantize(w, jnp.stack).astype(w.dtype) if isinstance(w, Quantized) else w


def lookup(w: Array | Quantized, index: Integer[Array, "..."]) -> Shaped[Array, "... d"]:
    """The rows of a table."""
    if isinstance(w, Quantized):
        return dense(w.with_parts(lambda part: part[index]))
    return w[index]


def product(
    x: Float[Array, "*b k"],
    w: Array | Quantized,
    bias: Array | None = None,
    *,
    axis: int = -2,
    dtype: Dtype | None = None,
) -> Float[Array, "*c n"]:
    """x W + b for a matrix, [K, N], or for each matrix of a stack, [C, K, N].

    A matrix takes any x, [..., K]. A stack takes rows for each of its matrices, [C, Z, K], or the
    same rows for all, [1, Z, K], and gives [C, Z, N].

    A `Quantized` whose `integer` is set quantises the rows of x; any other is dequantised (see
    `common.quantization`).

    Args:
      x: The rows, in the dtype of the matrix (`promote_dtype`).
      w: The matrix or stack.
      bias: Added; it broadcasts to the result.
      axis: The axis of inputs of `w`: -2, or -1 where it is [..., N, K].
      dtype: The dtype in which products are summed, and of the result; that of x if None.
    """
    if isinstance(w, Quantized) and w.integer and w.scheme == "q8":
        y = _integer_product(x, w).astype(dtype or x.dtype)
    else:
        y = _product(x, dense(w), axis, dtype)
    return y if bias is None else y + bias


def _product(x: Array, w: Array, axis: int, dtype: Dtype | None) -> Array:
    w = w if axis == -2 else w.swapaxes(-1, -2)
    if w.ndim > 2 and len(x) == 1:
        # With few rows one batched product, since separate ones take copies of the matrices; with
        # many separate products, which are faster. jnp.einsum would copy the weight in both.
        if x.shape[1] >= MANY_ROWS:
            return jnp.stack([jnp.matmul(x[0], part, preferred_element_type=dtype) for part in w])
        x = jnp.broadcast_to(x, (len(w), *x.shape[1:]))
    return jnp.matmul(x, w, preferred_element_type=dtype)


def _integer_product(x: Array, w: Quantized) -> Array:
    values, scale = quantize_rows(x)
    if w.ndim > 2 and len(x) == 1:
        values = jnp.broadcast_to(values, (len(w.values), *values.shape[1:]))
    sums = integer_sums(values, w.values).astype(jnp.float32)
    return sums * scale * jnp.swapaxes(w.scale, -1, -2)


@default_promotion
def quantize_rows(x: Float[Array, "*b k"]) -> tuple[Int8[Array, "*b k"], Float[Array, "*b 1"]]:
    """See `common.quantization.quantize_rows`."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1, keepdims=True)
    inverse = jnp.where(largest > 0, 127 / jnp.where(largest > 0, largest, 1), 0)
    return jnp.rint(x * inverse).astype(jnp.int8), largest / 127


def integer_sums(x: Int8[Array, "*b k"], values: Int8[Array, "*c n k"]) -> Int[Array, "*d n"]:
    """See `common.quantization.integer_sums`."""
    batch = tuple(range(values.ndim - 2))
    contracted = (x.ndim - 1,), (values.ndim - 1,)
    return jax.lax.dot_general(x, values, (contracted, (batch, batch)), None, jnp.int32)
