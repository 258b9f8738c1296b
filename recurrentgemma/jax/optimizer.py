"""The optimisers of `common.training.optimization`, built from Optax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from recurrentgemma.common.training.optimization import (
    ADAFACTOR_CLIP,
    ADAFACTOR_DECAY,
    ADAFACTOR_EPS,
    ADAFACTOR_MIN_SCALE,
    OptimizerOptions,
)

Arrays = Mapping[str, Array]
# Optax's names for the moments of `moment_shapes`, where they differ.
_FIELDS = {"momentum": "trace"}


def make_optimizer(
    options: OptimizerOptions, decay: Mapping[str, bool], learning_rate: float | Array
) -> optax.GradientTransformation:
    """The optimiser for one step; its state does not depend on the learning rate.

    Args:
      options: The optimiser and its settings.
      decay: Whether weight decay applies, by path.
      learning_rate: The learning rate of this step.
    """
    decayed = optax.add_decayed_weights(options.weight_decay, dict(decay))
    descend = optax.scale_by_learning_rate(learning_rate)
    match options.name:
        case "adamw":
            direction = optax.scale_by_adam(options.b1, options.b2, options.eps)
            return optax.chain(direction, decayed, descend)
        case "sgd" if options.momentum:
            return optax.chain(decayed, optax.trace(options.momentum), descend)
        case "sgd":
            return optax.chain(decayed, descend)
        case _:
            return optax.chain(_adafactor(learning_rate), decayed, descend)


def get_moments(
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]], state: optax.OptState
) -> dict[str, dict[str, Array]]:
    """The optimiser's moments, by name and path.

    Args:
      shapes: Their shapes (`moment_shapes`).
      state: The optimiser's state.
    """
    moments = {name: optax.tree.get(state, _FIELDS.get(name, name)) for name in shapes}
    return {name: {path: moments[name][path] for path in paths} for name, paths in shapes.items()}


def set_moments(
    state: optax.OptState, step: int, moments: Mapping[str, Mapping[str, Array]]
) -> optax.OptState:
    """An optimiser's state after `step` steps, with these moments."""
    fields: dict[str, Any] = {
        _FIELDS.get(name, name): dict(arrays) for name, arrays in moments.items()
    }
    if optax.tree.get(state, "count") is not None:
        fields["count"] = jnp.asarray(step, jnp.int32)
    return optax.tree.set(state, **fields)


class _AdafactorState(NamedTuple):
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    rows: Arrays
    columns: Arrays
    nu: Arrays


def _adafactor(learning_rate: float | Array) -> optax.GradientTransformation:
    """Adafactor's direction, the same as in `torch.optim.Adafactor`.

    Optax's Adafactor factors the two largest axes; in a stack of matrices these need not be the
    last two.
    """

    def init(params: Arrays) -> _AdafactorState:
        matrices = {path: p for path, p in params.items() if p.ndim > 1}
        return _AdafactorState(
            jnp.zeros((), jnp.int32),
            {path: jnp.zeros((*p.shape[:-1], 1), p.dtype) for path, p in matrices.items()},
            {
                path: jnp.zeros((*p.shape[:-2], 1, p.shape[-1]), p.dtype)
                for path, p in matrices.items()
            },
            {path: jnp.zeros_like(p) for path, p in params.items() if p.ndim == 1},
        )

    def update(grads: Arrays, state: _AdafactorState, params: Arrays | None = None):
        assert params is not None
        count = state.count + 1
        share = count.astype(jnp.float32) ** -ADAFACTOR_DECAY

        def average(old: Arrays, axis: int | None) -> dict[str, Array]:
            new = {path: grads[path] ** 2 for path in old}
            if axis is not None:
                new = {path: square.mean(axis, keepdims=True) for path, square in new.items()}
            return {path: (p + share * (new[path] - p)).astype(p.dtype) for path, p in old.items()}

        rows, columns = average(state.rows, -1), average(state.columns, -2)
        nu = average(state.nu, None)

        def direction(path: str) -> Array:
            if path in nu:
                v = nu[path]
            else:
                mean = rows[path].mean(-2, keepdims=True)
                v = rows[path] @ columns[path] / jnp.maximum(mean, ADAFACTOR_EPS)
            u = grads[path] * jax.lax.rsqrt(jnp.maximum(v, ADAFACTOR_EPS**2))
            scale = jnp.maximum(_rms(params[path]), ADAFACTOR_MIN_SCALE)
            cap = jnp.minimum(1.0, count.astype(jnp.float32) ** -0.5 / learning_rate)
            return cap * scale * u / jnp.maximum(1.0, _rms(u) / ADAFACTOR_CLIP)

        updates = {path: direction(path) for path in grads}
        return updates, _AdafactorState(count, rows, columns, nu)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _rms(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(x**2))
