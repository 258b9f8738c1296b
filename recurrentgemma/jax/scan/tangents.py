"""Linear functions with a transpose of their own, which JAX differentiates in both modes.

`jax.custom_vjp` knows no forward mode. A rule of `jax.custom_jvp` may use such a function of the
tangents: reverse mode runs its transpose, forward mode the function itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array


class Linear(NamedTuple):
    """A function of residuals, and of a tree of arrays in which it is linear.

    Attributes:
      run: The function, in any operations.
      derivable: The same in operations that JAX differentiates.
      like: A function of the same arguments; arrays of the types of the results.
      interpreted: Whether `run` is an interpreted kernel, which may have effects.
    """

    run: Callable[..., Any]
    derivable: Callable[..., Any]
    like: Callable[..., Any]
    interpreted: bool = False

    def each(self, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Linear:
        """The same with each of its functions changed."""
        run, derivable, like = map(change, self[:3])
        return Linear(run, derivable, like, self.interpreted)


def linear(function: Linear, transpose: Linear, residuals: Any, x: Any) -> Any:
    """`function.run(residuals, x)`; reverse mode calls `transpose.run(residuals, gradients)`."""
    leaves, tree = jax.tree.flatten((residuals, x))
    out_tree = jax.tree.structure(function.like(residuals, x))
    count = len(jax.tree.leaves(residuals))
    gradients_tree = jax.tree.structure((residuals, function.like(residuals, x)))
    flat = _flat(function, tree), _flat(transpose, gradients_tree)
    return jax.tree.unflatten(out_tree, _bind(*flat, count, leaves))


def _flat(function: Linear, tree: Any) -> Linear:
    """The function of the leaves of (residuals, x), to a list of leaves."""

    def of_leaves(part: Callable[..., Any]) -> Callable[..., list[Array]]:
        return lambda *leaves: jax.tree.leaves(part(*jax.tree.unflatten(tree, leaves)))

    return function.each(of_leaves)


def _bind(function: Linear, transpose: Linear, count: int, leaves: Sequence[Any]) -> list[Any]:
    types = tuple(jax.make_jaxpr(function.like)(*leaves).out_avals)
    effects = jax.make_jaxpr(function.run)(*leaves).effects if function.interpreted else ()
    return _linear_p.bind(
        *leaves,
        function=function,
        transpose=transpose,
        count=count,
        types=types,
        caused=frozenset(effects),
    )


_linear_p = Primitive("linear")
_linear_p.multiple_results = True


def _run(*leaves, function: Linear, **_: Any) -> list[Any]:
    return function.run(*leaves)


def _jvp(primals, tangents, *, function: Linear, transpose: Linear, count: int, **_: Any):
    """It is linear in x. Its dependence on the residuals is differentiated if they vary."""
    out = _bind(function, transpose, count, primals)
    if all(isinstance(tangent, ad.Zero) for tangent in tangents[:count]):
        x = map(ad.instantiate_zeros, tangents[count:])
        return out, _bind(function, transpose, count, [*primals[:count], *x])
    varied = tuple(map(_tangent, primals, tangents))
    return out, jax.jvp(function.derivable, tuple(primals), varied)[1]


def _tangent(primal: Any, tangent: Any) -> Any:
    if not jnp.issubdtype(primal.dtype, jnp.floating):
        return np.zeros(primal.shape, jax.dtypes.float0)
    return ad.instantiate_zeros(tangent)


def _transpose(gradients, *leaves, function: Linear, transpose: Linear, count: int, **_: Any):
    gradients = map(ad.instantiate_zeros, gradients)
    out = _bind(transpose, function, count, [*leaves[:count], *gradients])
    wanted = map(ad.is_undefined_primal, leaves[count:])
    return [None] * count + [z if w else None for z, w in zip(out, wanted, strict=True)]


def _batched(leaves, axes, *, function: Linear, transpose: Linear, count: int, **_: Any):
    """The mapped axis stands first in x, even if only residuals have it."""
    size = next(z.shape[axis] for z, axis in zip(leaves, axes, strict=True) if axis is not None)

    def first(z: Array, axis: int | None) -> Array:
        return jnp.broadcast_to(z, (size, *z.shape)) if axis is None else jnp.moveaxis(z, axis, 0)

    x = map(first, leaves[count:], axes[count:])

    def mapped(function: Linear) -> Linear:
        def over(part: Callable[..., Any]) -> Callable[..., Any]:
            def run(*leaves):
                rest = len(leaves) - count
                in_axes = (*axes[:count], *[0] * rest)
                return jax.vmap(part, in_axes, axis_size=size)(*leaves)

            return run

        return function.each(over)

    out = _bind(mapped(function), mapped(transpose), count, [*leaves[:count], *x])
    return out, [0] * len(out)


_linear_p.def_impl(_run)
_linear_p.def_effectful_abstract_eval(lambda *_, types, caused, **__: (types, caused))
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batched
mlir.register_lowering(_linear_p, mlir.lower_fun(_run, multiple_results=True))
