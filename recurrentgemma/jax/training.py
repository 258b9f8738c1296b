"""Training: a state, the loss, one step, evaluation."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.typing import Dtype
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.layer_spec import require_match
from recurrentgemma.common.training.adapters import Adapters, read_adapters, write_adapters
from recurrentgemma.common.training.batch import Batch, check_batch
from recurrentgemma.common.training.lora import LoraOptions, trainable_specs
from recurrentgemma.common.training.optimization import (
    OptimizerOptions,
    decay_mask,
    grouped,
    learning_rate,
    moment_shapes,
    state_shapes,
)
from recurrentgemma.jax.lora import adapt, merge
from recurrentgemma.jax.model import Model
from recurrentgemma.jax.optimizer import get_moments, make_optimizer, set_moments
from recurrentgemma.jax.runtime.compiler import platform_of
from recurrentgemma.jax.runtime.train_step import as_weights, compiled, divisor, total, tree_of
from recurrentgemma.jax.runtime.trees import Params, get_path

Metrics = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """A model in training.

    Attributes:
      step: The number of steps done.
      parameters: The trained parameters, by the layer spec's paths, in the optimiser state's dtype.
      optimizer_state: The state of optax's optimiser.
      base: With LoRA, the frozen parameters under the adapters.
      model: The model.
      optimizer: How it is optimised.
      lora: Which adapters are trained; the model's own parameters if None.
      dtype: The dtype of the parameters in the forward pass.
    """

    step: int
    parameters: dict[str, Array]
    optimizer_state: optax.OptState
    base: Params | None
    model: Model = flax.struct.field(pytree_node=False)
    optimizer: OptimizerOptions = flax.struct.field(pytree_node=False)
    lora: LoraOptions | None = flax.struct.field(pytree_node=False)
    dtype: Dtype = flax.struct.field(pytree_node=False)


def create_train_state(
    model: Model,
    params: Params,
    *,
    optimizer: OptimizerOptions | None = None,
    lora: LoraOptions | None = None,
    state_dtype: Dtype = jnp.float32,
    seed: int = 0,
) -> TrainState:
    """The state before the first step.

    Args:
      model: The model.
      params: Its parameters. They are copied, or shared with LoRA; they do not change.
      optimizer: How to optimise; AdamW if None.
      lora: Train adapters of this kind on frozen parameters; all parameters if None.
      state_dtype: The dtype of the optimiser's state and of the parameters that it updates. If it
        is wider than the model's, the forward pass casts them, so that small updates are not lost.
      seed: The seed of the adapters' initial values.

    Raises:
      ValueError: The parameters are not the model's, or LoRA has no targets in it.
    """
    params = params.get("params", params)
    optimizer = OptimizerOptions() if optimizer is None else optimizer
    specs = trainable_specs(model.config, lora)
    if lora is None:
        values = {s.path: jnp.array(get_path(params, s.path), state_dtype) for s in specs}
        base = None
    else:
        base, values = adapt(model.config, params, lora, state_dtype, seed)
    values = _placed(values, (base, values))
    optimizer_state = make_optimizer(optimizer, decay_mask(specs), 0.0).init(values)
    return TrainState(
        step=0,
        parameters=values,
        optimizer_state=_placed(optimizer_state, values),
        base=base,
        model=model,
        optimizer=optimizer,
        lora=lora,
        dtype=jnp.dtype(get_path(params, "embedder.input_embedding").dtype),
    )


def loss_fn(
    model: Model,
    params: Params,
    batch: Batch,
    adapters: Mapping[str, Array] | None = None,
    lora: LoraOptions | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The weighted mean of -log p(target), in float32 or wider; 0 if all weights are 0.

    Args:
      model: The model.
      params: Its parameters; under adapters, those that `adapt` returns.
      batch: The tokens, targets and weights.
      adapters: A and B of each LoRA target, if any.
      lora: The options of the adapters.

    Returns:
      The loss, and "loss" and "tokens", the sum of the weights.
    """
    batch = _on_host(model, batch)
    tokens = as_weights(batch.weights).sum()
    loss = total(model, params, batch, adapters, lora) / divisor(tokens)
    return loss, {"loss": loss, "tokens": tokens}


def train_step(state: TrainState, batches: Batch | Sequence[Batch]) -> tuple[TrainState, Metrics]:
    """One update, by the gradient of the weighted mean over all batches.

    Args:
      state: Its buffers are donated: continue with the state returned.
      batches: One batch, or several of one shape whose gradients are accumulated.

    Returns:
      The new state, and "loss", "tokens" (the sum of the weights), "grad_norm" (before clipping)
      and "learning_rate". Arrays among them may still be computed.
    """
    batches = [batches] if isinstance(batches, Batch) else list(batches)
    stacked = Batch(
        *map(_stacked, zip(*(_on_host(state.model, batch) for batch in batches), strict=True))
    )
    rate = learning_rate(state.optimizer, state.step)
    parameters, optimizer_state, metrics = compiled(platform_of(state.parameters)).update(
        state.model,
        state.optimizer,
        state.lora,
        state.dtype,
        state.parameters,
        state.optimizer_state,
        state.base,
        stacked,
        rate,
    )
    state = state.replace(  # pyright: ignore[reportAttributeAccessIssue]
        step=state.step + 1, parameters=parameters, optimizer_state=optimizer_state
    )
    return state, {**metrics, "learning_rate": rate}


def evaluate(state: TrainState, batches: Iterable[Batch]) -> dict[str, float]:
    """The weighted mean over all batches: "loss", "perplexity", "tokens" (the sum of weights)."""
    function = compiled(platform_of(state.parameters)).total
    summed, tokens = 0.0, 0.0
    for batch in (_on_host(state.model, batch) for batch in batches):
        args = state.model, state.lora, state.dtype, state.parameters, state.base, batch
        summed += float(function(*args))
        tokens += float(np.asarray(batch.weights).sum(dtype=np.float64))
    loss = summed / tokens if tokens else 0.0
    return {"loss": loss, "tokens": tokens, "perplexity": math.exp(min(loss, 700.0))}


def state_arrays(state: TrainState) -> dict[str, np.ndarray]:
    """Everything that training changes, in the Flax layout; the PyTorch twin has the same.

    Names are "step", "parameters.<path>" and the optimiser's, such as "mu.<path>" (see
    `common.training.optimization.moment_shapes`). On a CPU the arrays are views, valid until the
    next step.
    """
    specs = trainable_specs(state.model.config, state.lora)
    shapes = moment_shapes(state.optimizer, specs)
    moments = get_moments(shapes, state.optimizer_state)
    values = {spec.path: state.parameters[spec.path] for spec in specs}
    groups = {"parameters": values, **moments}
    return {"step": np.asarray(state.step)} | {
        f"{group}.{path}": np.asarray(value)
        for group, values in groups.items()
        for path, value in values.items()
    }


def load_state_arrays(state: TrainState, arrays: Mapping[str, np.ndarray]) -> TrainState:
    """The state with the arrays that `state_arrays` of either twin returned, cast to its dtypes.

    Raises:
      ValueError: Names or shapes differ from the state's; the message lists all differences.
    """
    specs = trainable_specs(state.model.config, state.lora)
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    require_match(state_shapes(state.optimizer, specs), shapes)
    dtype = next(iter(state.parameters.values())).dtype
    moments = {
        group: {path: jnp.array(array, dtype) for path, array in part.items()}
        for group, part in grouped(arrays).items()
    }
    parameters, step = moments.pop("parameters"), int(arrays["step"])
    parameters = {spec.path: parameters[spec.path] for spec in specs}
    optimizer_state = set_moments(state.optimizer_state, step, moments)
    return state.replace(  # pyright: ignore[reportAttributeAccessIssue]
        step=step,
        parameters=_placed_like(parameters, state.parameters),
        optimizer_state=_placed_like(optimizer_state, state.optimizer_state),
    )


def parameters(state: TrainState) -> Params:
    """The model's parameters, adapters merged, to sample from or to save."""
    if state.lora is None:
        return tree_of(state.parameters, state.dtype, copy=True)
    assert state.base is not None
    return merge(state.model.config, state.base, state.parameters, state.lora, state.dtype)


def save_adapters(path: str | os.PathLike[str], state: TrainState, *, force: bool = False) -> None:
    """Writes only the adapters, to a file that either twin and `recurrentgemma merge` read.

    Raises:
      ValueError: The state has no adapters.
      CheckpointError: `path` exists and `force` is not set, or it cannot be written.
    """
    if state.lora is None:
        raise UserError("the state has no adapters: it was created without lora")
    specs = trainable_specs(state.model.config, state.lora)
    arrays = {spec.path: np.asarray(state.parameters[spec.path]) for spec in specs}
    write_adapters(path, Adapters(state.model.config, state.lora, arrays), force=force)


def load_adapters(path: str | os.PathLike[str], model: Model, params: Params) -> Params:
    """A model's parameters with the adapters in a file merged into them, in its dtype.

    Raises:
      CheckpointError: The file holds no adapters, is damaged, or belongs to another model.
    """
    _, options, arrays = read_adapters(path, model.config)
    base, _ = adapt(model.config, params, options, jnp.float32, 0)
    dtype = get_path(base, "embedder.input_embedding").dtype
    adapters = {name: jnp.asarray(array) for name, array in arrays.items()}
    return merge(model.config, base, adapters, options, dtype)


def _on_host(model: Model, batch: Batch) -> Batch:
    """The batch as arrays of JAX or NumPy, its values checked."""
    batch = Batch(*(z if isinstance(z, jax.Array) else np.asarray(z) for z in batch))
    check_batch(batch, model.config.model.vocab_size)
    return batch


def _stacked(arrays: Sequence[Any]) -> Any:
    """One array for several batches, on the host or on the devices that they are on."""
    on_devices = any(isinstance(array, jax.Array) for array in arrays)
    return (jnp if on_devices else np).stack(arrays)


def _placed(tree: Any, beside: Any) -> Any:
    """The tree, its arrays that have no fixed device placed on the devices of `beside`.

    A step places them there, too. Otherwise the second step would compile again.
    """
    fixed = [leaf for leaf in jax.tree.leaves(beside) if getattr(leaf, "committed", False)]
    if not fixed:
        return tree
    place = fixed[0].sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec())
    return jax.tree.map(lambda x: x if x.committed else jax.device_put(x, place), tree)


def _placed_like(new: Any, old: Any) -> Any:
    """The arrays of a tree, placed where another tree's are."""
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding) if y.committed else x, new, old)
