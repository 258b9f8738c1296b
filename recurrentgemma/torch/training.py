"""Training: a state, the loss, one step, evaluation."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.layer_spec import require_match
from recurrentgemma.common.sharding import require_fit
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
from recurrentgemma.torch.lora import adapt, merge
from recurrentgemma.torch.loss import cross_entropy
from recurrentgemma.torch.model import Model
from recurrentgemma.torch.optimizer import Optimizer, make_optimizer, step
from recurrentgemma.torch.products import dense
from recurrentgemma.torch.quantization import is_quantized
from recurrentgemma.torch.runtime.arrays import to_array, to_tensor
from recurrentgemma.torch.runtime.processes import (
    by_the_first,
    gathered,
    row_parts,
    summed,
    time_parts,
)
from recurrentgemma.torch.runtime.split_tensors import mesh_of, norm_of, whole
from recurrentgemma.torch.runtime.teams import TIME
from recurrentgemma.torch.sharding import reshard
from recurrentgemma.torch.training_state import (
    copy_parameters,
    load_state_tensors,
    own_parameters,
    state_tensors,
)
from recurrentgemma.torch.training_state import layout_of as layout_of
from recurrentgemma.torch.training_state import load_state as load_state
from recurrentgemma.torch.training_state import save_state as save_state
from recurrentgemma.torch.training_state import write_state as write_state

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Metrics = dict[str, Any]


@dataclasses.dataclass
class TrainState:
    """A model in training.

    Attributes:
      step: The number of steps done.
      parameters: The trained parameters, by the layer spec's paths, in the optimiser state's dtype.
      optimizer_state: PyTorch's optimiser of these parameters.
      model: The model; with LoRA, it has adapters.
      optimizer: How it is optimised: options, or the function that made `optimizer_state`.
      lora: Which adapters are trained; the model's own parameters if None.
      dtype: The dtype of the parameters in the forward pass.
    """

    step: int
    parameters: dict[str, Tensor]
    optimizer_state: torch.optim.Optimizer
    model: Model
    optimizer: Optimizer
    lora: LoraOptions | None
    dtype: torch.dtype


def create_train_state(
    model: Model,
    *,
    optimizer: Optimizer | None = None,
    lora: LoraOptions | None = None,
    state_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> TrainState:
    """The state before the first step.

    Args:
      model: The model. Training changes it in place; with LoRA it does not change, and the state's
        model shares its tensors.
      optimizer: How to optimise; AdamW if None. A function, such as a class of `torch.optim`, makes
        an optimiser of the list of tensors, which are in the order of the layer spec; gradients are
        not clipped, and its learning rate is its own.
      lora: Train adapters of this kind on frozen parameters; all parameters if None.
      state_dtype: The dtype of the optimiser's state and of the parameters that it updates. If it
        is wider than the model's, it updates a copy of them, so that small updates are not lost.
      seed: The seed of the adapters' initial values.

    Raises:
      ValueError: The weights are quantised and there is no `lora`, LoRA has no targets in the
        model, or the optimiser is neither options nor a function that makes one of the tensors.
    """
    optimizer = OptimizerOptions() if optimizer is None else optimizer
    specs = trainable_specs(model.config, lora)
    dtype = model.embedder.input_embedding.dtype
    if lora is None:
        require_plain(is_quantized(model))
        model.requires_grad_(True)
        values = {
            path: p if p.dtype == state_dtype else p.detach().to(state_dtype)
            for path, p in own_parameters(model).items()
        }
    else:
        model, values = adapt(model, lora, state_dtype, seed)
    return TrainState(
        step=0,
        parameters=values,
        optimizer_state=make_optimizer(optimizer, decay_mask(specs), values),
        model=model,
        optimizer=optimizer,
        lora=lora,
        dtype=dtype,
    )


def loss_fn(model: Model, batch: Batch) -> tuple[Float[Tensor, ""], Metrics]:
    """The weighted mean of -log p(target), in float32 or wider; 0 if all weights are 0.

    Args:
      model: The model, with adapters or without.
      batch: The tokens, targets and weights.

    Returns:
      The loss, and "loss" and "tokens", the sum of the weights.
    """
    mesh = mesh_of(model.parameters())
    tokens = _tokens([batch], mesh)
    loss = _total(model, batch) / _divisor(tokens)
    value = summed(loss.detach(), mesh)
    if mesh is not None:
        loss = loss * row_parts(mesh)[1]  # FSDP takes the mean of the processes' gradients
        loss = loss + (value - loss.detach())
    return loss, {"loss": value, "tokens": tokens}


def train_step(state: TrainState, batches: Batch | Sequence[Batch]) -> tuple[TrainState, Metrics]:
    """One update, by the gradient of the weighted mean over all batches.

    Args:
      state: It changes in place.
      batches: One batch, or several whose gradients are accumulated.

    Returns:
      The state, and "loss", "tokens" (the sum of the weights), "grad_norm" (before clipping) and
      "learning_rate"; an own optimiser's is its first group's, after the step.
    """
    batches = batch_list(batches)
    mesh = mesh_of(state.parameters.values())
    tokens = _tokens(batches, mesh)
    ranks = row_parts(mesh)[1]
    settings = step_settings(state.optimizer)
    rate = learning_rate(settings, state.step)

    def accumulate() -> Tensor:
        loss = torch.zeros((), device="cpu")
        for batch in batches:
            share = _total(state.model, batch) / _divisor(tokens)
            (share * ranks).backward()  # FSDP takes the mean of the processes' gradients
            loss = loss.to(share) + share.detach()
            _collect_gradients(state)
        return summed(loss, mesh)

    def again() -> Tensor:
        copy_parameters(state)
        state.optimizer_state.zero_grad()
        return accumulate()

    loss = accumulate()
    grads = [p.grad for p in state.parameters.values() if p.grad is not None]
    norm = norm_of(grads)
    if settings.clip_norm is not None:
        scale = (settings.clip_norm / norm).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale)
    groups = state.optimizer_state.param_groups
    if isinstance(state.optimizer, OptimizerOptions):
        for group in groups:
            group["lr"] = rate
    if not settings.skip_nonfinite or bool(torch.isfinite(loss) & torch.isfinite(norm)):
        step(state.optimizer_state, again)
    state.optimizer_state.zero_grad()
    copy_parameters(state)
    state.step += 1
    rate = groups[0].get("lr")
    return state, {"loss": loss, "tokens": tokens, "grad_norm": norm, "learning_rate": rate}


@torch.no_grad()
def evaluate(state: TrainState, batches: Iterable[Batch]) -> dict[str, float]:
    """The weighted mean over all batches: "loss", "perplexity", "tokens" (the sum of weights)."""
    total, tokens = 0.0, 0.0
    mesh = mesh_of(state.parameters.values())
    _, parts = time_parts(mesh)
    for batch in batches:
        total += float(_total(state.model, batch))
        tokens += _sum(batch.weights) / parts
    reshard(state.model)
    device = "cpu" if mesh is None else mesh.device_type
    sums = torch.tensor([total, tokens], dtype=torch.float64, device=device)
    total, tokens = summed(sums, mesh).tolist()
    loss = total / tokens if tokens else 0.0
    return {"loss": loss, "tokens": tokens, "perplexity": math.exp(min(loss, 700.0))}


def state_arrays(state: TrainState) -> dict[str, np.ndarray]:
    """Everything that training changes, in the Flax layout; the JAX twin has the same.

    Names are "step", "parameters.<path>" and the optimiser's, such as "mu.<path>" (see
    `common.training.optimization.moment_shapes`). On a CPU the arrays are views, valid until the
    next step. The tensors of an own optimiser, "optimizer.<path>.<its name>", are for this twin
    alone.

    Raises:
      ValueError: An own optimiser holds more than tensors and numbers, as `LBFGS` does.
    """
    arrays = {name: to_array(whole(tensor)) for name, tensor in state_tensors(state).items()}
    return arrays | {"step": np.asarray(state.step)}


@torch.no_grad()
def load_state_arrays(state: TrainState, arrays: Mapping[str, np.ndarray]) -> TrainState:
    """The state with the arrays that `state_arrays` of either twin returned, cast to its dtypes.

    With an own optimiser they must be this twin's, and the optimiser the same.

    Raises:
      ValueError: Names or shapes differ from the state's; the message lists all differences.
    """
    specs = trainable_specs(state.model.config, state.lora)
    require_match(state_shapes(state.optimizer, specs), given_shapes(state.optimizer, arrays))
    tensors = {name: to_tensor(np.array(array)) for name, array in arrays.items()}
    return load_state_tensors(state, tensors)


def parameters(state: TrainState) -> Model:
    """The model, adapters merged, to sample from or to save.

    Without LoRA it is the state's own model, which later steps change.
    """
    if state.lora is None:
        return state.model
    return merge(state.model, state.parameters, state.lora, state.dtype)


def save_adapters(path: str | os.PathLike[str], state: TrainState, *, force: bool = False) -> None:
    """Writes only the adapters, to a file that either twin and `recurrentgemma merge` read.

    Raises:
      ValueError: The state has no adapters.
      CheckpointError: `path` exists and `force` is not set, or it cannot be written.
    """
    if state.lora is None:
        raise UserError("the state has no adapters: it was created without lora")
    config, lora = state.model.config, state.lora

    def write(tensors: Iterable[Tensor]) -> None:
        arrays = dict(zip(state.parameters, map(to_array, tensors), strict=True))
        write_adapters(path, Adapters(config, lora, arrays), force=force)

    values = state.parameters.values()
    by_the_first(mesh_of(values), values, write)


def _total(model: Model, batch: Batch) -> Float[Tensor, ""]:
    """The weighted sum of -log p(target)."""
    device = model.embedder.input_embedding.device
    arrays = (z if isinstance(z, Tensor) else np.asarray(z) for z in require_batch(batch))
    batch = Batch(*arrays)
    check_batch(batch, model.config.model.vocab_size)
    tokens, segment_pos, targets, weights = (
        z.to(device) if isinstance(z, Tensor) else torch.tensor(z, device=device) for z in batch
    )
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    place, parts = time_parts(model.mesh)
    if parts > 1:
        require_fit(model.config, {TIME: parts}, length=tokens.shape[1])
        targets, weights = (z.unflatten(1, (parts, -1))[:, place] for z in (targets, weights))
    hidden, _ = model.hidden(tokens, segment_pos, part=True)
    # Under FSDP it is whole now.
    embedding = model.team.local(dense(model.embedder.input_embedding))
    settings = {"soft_cap": model.config.model.soft_cap, "mesh": model.mesh}
    return cross_entropy(hidden, embedding, targets, weights, **settings)


def _sum(values: Any) -> float:
    if isinstance(values, Tensor):
        return float(values.sum(dtype=torch.float64))
    return float(np.asarray(values).sum(dtype=np.float64))


def _tokens(batches: Sequence[Batch], mesh: DeviceMesh | None) -> float:
    """The sum of the weights over the batches of all processes.

    Raises:
      ValueError: The processes have different numbers of batches, or one has no rows; or processes
        that compute the same rows together are given different ones.
    """
    weight = sum(_sum(require_batch(batch).weights) for batch in batches)
    rows = min((len(batch.tokens) for batch in batches), default=0)
    ids = sum(_sum(batch.tokens) for batch in batches)
    everywhere = gathered([weight, len(batches), rows, ids], mesh)
    each = len(everywhere) // row_parts(mesh)[1]
    for index, found in enumerate(everywhere):
        if found != everywhere[first := index - index % each]:
            raise UserError(
                f"processes that share rows must give the same: {first} and {index} do not"
            )
    tokens, counts, least, _ = zip(*everywhere[::each], strict=True)
    if mesh is not None and (len(set(counts)) > 1 or not min(least)):
        raise UserError(
            "each process must give as many batches as the others, of at least one row, got "
            f"{[int(count) for count in counts]} batches, of at least {list(map(int, least))} rows"
        )
    return sum(tokens)


def _divisor(tokens: float) -> float:
    return tokens if tokens > 0 else 1.0


def _collect_gradients(state: TrainState) -> None:
    """Moves the model's gradients to the optimiser's copy of its parameters, where it has one."""
    if state.lora is not None:
        return
    for path, parameter in own_parameters(state.model).items():
        seen = state.parameters[path]
        if seen is not parameter and parameter.grad is not None:
            grad = parameter.grad.to(seen.dtype)
            seen.grad = grad if seen.grad is None else seen.grad + grad
            parameter.grad = None
