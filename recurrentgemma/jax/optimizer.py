"""The optimisers of `common.training.optimization`, built from Optax, and any other of Optax's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.layer_spec import ParamSpec, require_match
from recurrentgemma.common.training.optimization import (
    ADAFACTOR_CLIP,
    ADAFACTOR_DECAY,
    ADAFACTOR_EPS,
    ADAFACTOR_MIN_SCALE,
    OWN,
    OptimizerOptions,
    moment_shapes,
)
from recurrentgemma.jax.sharding import is_split, place_beside

Arrays = Mapping[str, Array]
Optimizer = OptimizerOptions | optax.GradientTransformation
# Optax's names for the moments of `moment_shapes`, where they differ.
_FIELDS = {"momentum": "trace"}


def require_optimizer(optimizer: Any) -> None:
    """Raises `ValueError` unless it is options or has the functions of an Optax transformation."""
    own = all(callable(getattr(optimizer, name, None)) for name in ("init", "update"))
    if not isinstance(optimizer, OptimizerOptions) and (isinstance(optimizer, type) or not own):
        raise UserError(
            "optimizer must be OptimizerOptions or a gradient transformation of Optax, such as "
            f"optax.adamw(1e-3), got {optimizer!r}"
        )


def make_optimizer(
    options: Optimizer, decay: Mapping[str, bool], learning_rate: float | Array
) -> optax.GradientTransformationExtraArgs:
    """The optimiser for one step; its state does not depend on the learning rate.

    Args:
      options: The optimiser and its settings, or an Optax transformation.
      decay: Whether weight decay applies, by path.
      learning_rate: The learning rate of this step.
    """
    return optax.with_extra_args_support(_transformation(options, decay, learning_rate))


def _transformation(
    options: Optimizer, decay: Mapping[str, bool], learning_rate: float | Array
) -> optax.GradientTransformation:
    if not isinstance(options, OptimizerOptions):
        return options
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


def init_state(
    optimizer: Optimizer, decay: Mapping[str, bool], parameters: Arrays
) -> optax.OptState:
    """The optimiser's state before the first step; it shares no array, since steps donate it."""
    init = make_optimizer(optimizer, decay, 0.0).init
    if all(map(is_split, parameters.values())):
        return jax.jit(init, out_shardings=_places(init, parameters))(dict(parameters))
    state = init(dict(parameters))
    if isinstance(optimizer, OptimizerOptions):
        return state
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)


def abstract_state(
    optimizer: Optimizer, decay: Mapping[str, bool], parameters: Mapping[str, Any]
) -> optax.OptState:
    """What `init_state` would return of split parameters, as shapes, dtypes and shardings."""
    init = make_optimizer(optimizer, decay, 0.0).init
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(init, dict(parameters)),
        _places(init, parameters),
    )


def _places(init: Any, parameters: Arrays) -> Any:
    """The shardings of a state: moments lie as their parameters do, other arrays are whole."""
    first = next(iter(parameters.values()))

    def place(path: Any, leaf: Any) -> Any:
        keys: list[Any] = [getattr(entry, "key", None) for entry in path]
        owner = next((parameters[key] for key in keys if key in parameters), None)
        return place_beside(first, ()) if owner is None else place_beside(owner, leaf.shape)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(init, dict(parameters)))


def own_learning_rate(state: optax.OptState) -> Array | None:
    """The learning rate in a state of `optax.inject_hyperparams`, if there is one."""
    found = optax.tree.get_all_with_path(state, "learning_rate")
    return found[0][1] if found else None


def get_moments(
    options: Optimizer, specs: Sequence[ParamSpec], state: optax.OptState
) -> dict[str, dict[str, Array]]:
    """The optimiser's moments, by name and path; an own one's arrays by their places in its state.

    Args:
      options: The optimiser.
      specs: The parameters that it changes.
      state: The optimiser's state.
    """
    if not isinstance(options, OptimizerOptions):
        return {OWN: {name: _data(leaf) for name, leaf in _leaves(state).items()}}
    shapes = moment_shapes(options, specs)
    moments = {name: optax.tree.get(state, _FIELDS.get(name, name)) for name in shapes}
    return {name: {path: moments[name][path] for path in paths} for name, paths in shapes.items()}


def set_moments(
    options: Optimizer,
    state: optax.OptState,
    step: int,
    moments: Mapping[str, Mapping[str, Any]],
) -> optax.OptState:
    """An optimiser's state after `step` steps, with these moments.

    Raises:
      ValueError: The arrays of an own optimiser are of another one.
    """
    if not isinstance(options, OptimizerOptions):
        return _with_leaves(state, moments.get(OWN, {}))
    fields: dict[str, Any] = {}
    for name, arrays in moments.items():
        field = _FIELDS.get(name, name)
        old = optax.tree.get(state, field)
        fields[field] = {path: cast(arrays[path], old[path].dtype) for path in old}
    if optax.tree.get(state, "count") is not None:
        fields["count"] = jnp.asarray(step, jnp.int32)
    return optax.tree.set(state, **fields)


def cast(value: Any, dtype: Any) -> Any:
    """An array of the host or of the devices in a dtype."""
    return value.astype(dtype) if is_split(value) else np.asarray(value, dtype)


def _leaves(state: optax.OptState) -> dict[str, Array]:
    """The arrays of a state by their places in it, such as "0.mu.final_norm.scale"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def _is_key(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: Array) -> Array:
    """An array that NumPy can hold: of random keys, their bits."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _with_leaves(state: optax.OptState, arrays: Mapping[str, Any]) -> optax.OptState:
    """A state like another with these arrays, cast."""
    old = _leaves(state)
    require_match(
        {name: _data(leaf).shape for name, leaf in old.items()},
        {name: array.shape for name, array in arrays.items()},
    )

    def restored(name: str, leaf: Array) -> Array:
        array = jnp.array(arrays[name], _data(leaf).dtype)
        if not _is_key(leaf):
            return array
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))

    new = [restored(name, leaf) for name, leaf in old.items()]
    return jax.tree.unflatten(jax.tree.structure(state), new)


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
