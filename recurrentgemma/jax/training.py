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

from recurrentgemma.common.model.layer_spec import require_match
from recurrentgemma.common.training.adapters import Adapters, read_adapters, write_adapters
from recurrentgemma.common.training.batch import Batch
from recurrentgemma.common.training.lora import LoraOptions, trainable_specs
from recurrentgemma.common.training.optimization import (
    OptimizerOptions,
    decay_mask,
    grouped,
    learning_rate,
    moment_shapes,
    state_shapes,
)
from recurrentgemma.jax.griffin import Griffin, Params, get_path
from recurrentgemma.jax.lora import adapt, merge
from recurrentgemma.jax.optimizer import get_moments, make_optimizer, set_moments
from recurrentgemma.jax.runtime.compiler import platform_of
from recurrentgemma.jax.runtime.train_step import compiled, divisor, total, tree_of

Metrics = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """A model in training.

    Attributes:
      step: Steps done.
      parameters: What is trained, by the layer spec's paths, in the optimiser state's dtype.
      optimizer_state: Optax's.
      base: With LoRA, the frozen parameters under the adapters.
      model: The model.
      optimizer: How it is optimised.
      lora: The adapters that are trained; the model's own parameters if None.
      dtype: Of the parameters in the forward pass.
    """

    step: int
    parameters: dict[str, Array]
    optimizer_state: optax.OptState
    base: Params | None
    model: Griffin = flax.struct.field(pytree_node=False)
    optimizer: OptimizerOptions = flax.struct.field(pytree_node=False)
    lora: LoraOptions | None = flax.struct.field(pytree_node=False)
    dtype: Dtype = flax.struct.field(pytree_node=False)


def create_train_state(
    model: Griffin,
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
      params: Its parameters. They are copied, or under LoRA shared; they stay as they are.
      optimizer: How to optimise; AdamW if None.
      lora: Train adapters of this kind on frozen parameters; all parameters if None.
      state_dtype: Of what is trained, as the optimiser sees it, and of its state. Where it is wider
        than the parameters the forward pass casts them, so that small updates are not lost.
      seed: Of the adapters' initial values.

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
    model: Griffin,
    params: Params,
    batch: Batch,
    adapters: Mapping[str, Array] | None = None,
    lora: LoraOptions | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The mean over the weights of -log p(target), in float32 or wider; 0 where none counts.

    Args:
      model: The model.
      params: Its parameters; under adapters those that `adapt` returns.
      batch: What it reads and what follows.
      adapters: A and B of each target, if there are any.
      lora: What they were made of.

    Returns:
      The loss, and "loss" and "tokens", the sum of the weights.
    """
    tokens = jnp.asarray(batch.weights).sum()
    loss = total(model, params, batch, adapters, lora) / divisor(tokens)
    return loss, {"loss": loss, "tokens": tokens}


def train_step(state: TrainState, batches: Batch | Sequence[Batch]) -> tuple[TrainState, Metrics]:
    """One update, by the gradient of the mean over the weights of all batches.

    Args:
      state: Its parameters and optimiser state are used up: go on with the one returned.
      batches: One batch, or several of one shape whose gradients are accumulated.

    Returns:
      The new state, and "loss", "tokens" (the sum of the weights), "grad_norm" (before clipping)
      and "learning_rate". Those that are arrays are not waited for.
    """
    batches = [batches] if isinstance(batches, Batch) else list(batches)
    stacked = Batch(*(np.stack(arrays) for arrays in zip(*batches, strict=True)))
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
    """The mean over the weights of all batches: "loss", "tokens" (their sum) and "perplexity"."""
    function = compiled(platform_of(state.parameters)).total
    summed, tokens = 0.0, 0.0
    for batch in batches:
        args = state.model, state.lora, state.dtype, state.parameters, state.base, batch
        summed += float(function(*args))
        tokens += float(np.sum(batch.weights))
    loss = summed / tokens if tokens else 0.0
    return {"loss": loss, "tokens": tokens, "perplexity": math.exp(min(loss, 700.0))}


def state_arrays(state: TrainState) -> dict[str, np.ndarray]:
    """All that changes in training, in the Flax layout: what the PyTorch twin's has too.

    Names are "step", "parameters.<path>" and those of the optimiser, "mu.<path>" and so on (see
    `common.optimization.moment_shapes`).
    On a CPU they are views, good until the next step.
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
    """The state with these arrays, from `state_arrays` of either twin, cast to its dtypes.

    Raises:
      ValueError: Names or shapes are not the state's; all differences are listed.
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
    """The model's parameters, adapters merged: to sample from or to save."""
    if state.lora is None:
        return tree_of(state.parameters, state.dtype, copy=True)
    assert state.base is not None
    return merge(state.model.config, state.base, state.parameters, state.lora, state.dtype)


def save_adapters(path: str | os.PathLike[str], state: TrainState, *, force: bool = False) -> None:
    """Writes the adapters alone, to a file that either twin and `recurrentgemma merge` read.

    Raises:
      ValueError: The state has none.
      CheckpointError: `path` exists and `force` is not set, or cannot be written.
    """
    if state.lora is None:
        raise ValueError("the state has no adapters: it was created without lora")
    specs = trainable_specs(state.model.config, state.lora)
    arrays = {spec.path: np.asarray(state.parameters[spec.path]) for spec in specs}
    write_adapters(path, Adapters(state.model.config, state.lora, arrays), force=force)


def load_adapters(path: str | os.PathLike[str], model: Griffin, params: Params) -> Params:
    """The parameters of a model with the adapters in a file merged into them, in its dtype.

    Raises:
      CheckpointError: It is no adapter file, damaged, or of another model.
    """
    _, options, arrays = read_adapters(path, model.config)
    base, _ = adapt(model.config, params, options, jnp.float32, 0)
    dtype = get_path(base, "embedder.input_embedding").dtype
    adapters = {name: jnp.asarray(array) for name, array in arrays.items()}
    return merge(model.config, base, adapters, options, dtype)


def _placed(tree: Any, beside: Any) -> Any:
    """The arrays of a tree that are on no device of their own, on all that `beside` is on.

    As after a step: where places differ, the second step would compile anew.
    """
    fixed = [leaf for leaf in jax.tree.leaves(beside) if getattr(leaf, "committed", False)]
    if not fixed:
        return tree
    place = fixed[0].sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec())
    return jax.tree.map(lambda x: x if x.committed else jax.device_put(x, place), tree)


def _placed_like(new: Any, old: Any) -> Any:
    """The arrays of a tree where those of another tree are."""
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding) if y.committed else x, new, old)
