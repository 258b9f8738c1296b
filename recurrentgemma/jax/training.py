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
from recurrentgemma.common.training.adapters import Adapters, write_adapters
from recurrentgemma.common.training.batch import Batch, batch_list, check_batch, require_batch
from recurrentgemma.common.training.lora import LoraOptions, require_plain, trainable_specs
from recurrentgemma.common.training.optimization import (
    OptimizerOptions,
    decay_mask,
    given_shapes,
    learning_rate,
    state_shapes,
    step_settings,
)
from recurrentgemma.jax.lora import adapt, merge
from recurrentgemma.jax.model import Model
from recurrentgemma.jax.optimizer import (
    Optimizer,
    init_state,
    own_learning_rate,
    require_optimizer,
)
from recurrentgemma.jax.quantization import is_quantized
from recurrentgemma.jax.runtime.params import laid_out
from recurrentgemma.jax.runtime.processes import by_the_first
from recurrentgemma.jax.runtime.train_step import as_weights, compiled, divisor, total, tree_of
from recurrentgemma.jax.runtime.trees import Params, get_path
from recurrentgemma.jax.sharding import on_host, rows_on_mesh
from recurrentgemma.jax.training_state import layout_of as layout_of
from recurrentgemma.jax.training_state import load_state as load_state
from recurrentgemma.jax.training_state import load_state_tensors, state_tensors
from recurrentgemma.jax.training_state import save_state as save_state
from recurrentgemma.jax.training_state import write_state as write_state

Metrics = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """A model in training. Arrays may be NumPy's, as `flax.serialization` restores them.

    Attributes:
      step: The number of steps done.
      parameters: The trained parameters, by the layer spec's paths, in the optimiser state's dtype.
      optimizer_state: The state of optax's optimiser.
      base: With LoRA, the frozen parameters under the adapters.
      model: The model.
      optimizer: How it is optimised: options, or an Optax transformation.
      lora: Which adapters are trained; the model's own parameters if None.
      dtype: The dtype of the parameters in the forward pass.
    """

    step: int
    parameters: dict[str, Any]
    optimizer_state: optax.OptState
    base: Params | None
    model: Model = flax.struct.field(pytree_node=False)
    optimizer: Optimizer = flax.struct.field(pytree_node=False)
    lora: LoraOptions | None = flax.struct.field(pytree_node=False)
    dtype: Dtype = flax.struct.field(pytree_node=False)


def create_train_state(
    model: Model,
    params: Params,
    *,
    optimizer: Optimizer | None = None,
    lora: LoraOptions | None = None,
    state_dtype: Dtype = jnp.float32,
    seed: int = 0,
) -> TrainState:
    """The state before the first step.

    Args:
      model: The model.
      params: Its parameters. They are copied, or shared with LoRA; they do not change. On the
        model's mesh the arrays of the state lie as `common.sharding.layout` says, or as they are
        split already.
      optimizer: How to optimise; AdamW if None. An Optax transformation gets the gradients by the
        layer spec's paths, neither clipped nor scaled, and the keyword arguments `value`, `grad`
        and `value_fn`; its schedule is its own.
      lora: Train adapters of this kind on frozen parameters; all parameters if None.
      state_dtype: The dtype of the optimiser's state and of the parameters that it updates. If it
        is wider than the model's, the forward pass casts them, so that small updates are not lost.
      seed: The seed of the adapters' initial values.

    Raises:
      ValueError: The parameters are not the model's, they are quantised and there is no `lora`,
        LoRA has no targets in the model, or the optimiser is neither options nor a transformation.
    """
    params = laid_out(model, params)
    optimizer = OptimizerOptions() if optimizer is None else optimizer
    require_optimizer(optimizer)
    specs = trainable_specs(model.config, lora)
    if lora is None:
        require_plain(is_quantized(params))
        values = {s.path: jnp.array(get_path(params, s.path), state_dtype) for s in specs}
        base = None
    else:
        base, values = adapt(model.config, params, lora, state_dtype, seed, model.mesh)
    values = _placed(values, (base, values))
    optimizer_state = init_state(optimizer, decay_mask(specs), values)
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
      and "learning_rate", where it is known: a transformation's from `optax.inject_hyperparams`.
      Arrays among them may still be computed.
    """
    checked = [_on_host(state.model, batch) for batch in batch_list(batches)]
    stacked = _placed_batch(state.model, Batch(*map(_stacked, zip(*checked, strict=True))))
    rate = learning_rate(step_settings(state.optimizer), state.step)
    parameters, optimizer_state, metrics = compiled(state.parameters, state.optimizer_state).update(
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
    if not isinstance(state.optimizer, OptimizerOptions):
        rate = own_learning_rate(optimizer_state)
    return state, metrics if rate is None else {**metrics, "learning_rate": rate}


def evaluate(state: TrainState, batches: Iterable[Batch]) -> dict[str, float]:
    """The weighted mean over all batches: "loss", "perplexity", "tokens" (the sum of weights)."""
    function = compiled(state.parameters).total
    summed, tokens = 0.0, 0.0
    for batch in (_on_host(state.model, batch) for batch in batches):
        placed = _placed_batch(state.model, batch)
        args = state.model, state.lora, state.dtype, state.parameters, state.base, placed
        summed += float(function(*args))
        tokens += float(on_host(placed.weights).sum(dtype=np.float64))
    loss = summed / tokens if tokens else 0.0
    return {"loss": loss, "tokens": tokens, "perplexity": math.exp(min(loss, 700.0))}


def state_arrays(state: TrainState) -> dict[str, np.ndarray]:
    """Everything that training changes, in the Flax layout; the PyTorch twin has the same.

    Names are "step", "parameters.<path>" and the optimiser's, such as "mu.<path>" (see
    `common.training.optimization.moment_shapes`). On a CPU the arrays are views, valid until the
    next step. The arrays of an Optax transformation, "optimizer.<place in its state>", are for this
    twin alone.
    """
    return {name: on_host(value) for name, value in state_tensors(state).items()}


def load_state_arrays(state: TrainState, arrays: Mapping[str, np.ndarray]) -> TrainState:
    """The state with the arrays that `state_arrays` of either twin returned, cast to its dtypes.

    With an Optax transformation they must be this twin's, and the transformation the same.

    Raises:
      ValueError: Names or shapes differ from the state's; the message lists all differences.
    """
    specs = trainable_specs(state.model.config, state.lora)
    require_match(state_shapes(state.optimizer, specs), given_shapes(state.optimizer, arrays))
    return load_state_tensors(state, arrays)


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
    config, lora = state.model.config, state.lora

    def write(arrays: Iterable[np.ndarray]) -> None:
        values = {spec.path: array for spec, array in zip(specs, arrays, strict=True)}
        write_adapters(path, Adapters(config, lora, values), force=force)

    by_the_first((state.parameters[spec.path] for spec in specs), write)


def _on_host(model: Model, batch: Batch) -> Batch:
    """The batch as arrays of JAX or NumPy, its values checked."""
    arrays = (z if isinstance(z, jax.Array) else np.asarray(z) for z in require_batch(batch))
    batch = Batch(*arrays)
    check_batch(batch, model.config.model.vocab_size)
    return batch


def _stacked(arrays: Sequence[Any]) -> Any:
    """One array for several batches, on the host or on the devices that they are on."""
    on_devices = any(isinstance(array, jax.Array) for array in arrays)
    return (jnp if on_devices else np).stack(arrays)


def _placed_batch(model: Model, batch: Batch) -> Batch:
    """On a mesh this process's rows, [B, T] or [N, B, T], as part of the batch of all processes."""
    if model.mesh is None:
        return batch
    return Batch(*(rows_on_mesh(model.mesh, z) for z in batch))


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
