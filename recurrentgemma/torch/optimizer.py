"""The optimisers of `common.training.optimization`, built from PyTorch's, and any other of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.layer_spec import ParamSpec
from recurrentgemma.common.model.state_dict import is_kernel, to_torch, torch_shape
from recurrentgemma.common.training.optimization import (
    ADAFACTOR_CLIP,
    ADAFACTOR_DECAY,
    ADAFACTOR_EPS,
    ADAFACTOR_MIN_SCALE,
    OWN,
    OptimizerOptions,
    moment_shapes,
)
from recurrentgemma.torch.runtime.optimizer_state import load_own_tensors, own_tensors
from recurrentgemma.torch.runtime.split_adafactor import SplitAdafactor
from recurrentgemma.torch.runtime.split_tensors import mesh_of, part_of, zeros

Tensors = Mapping[str, Tensor]
Optimizer = OptimizerOptions | Callable[[list[Tensor]], torch.optim.Optimizer]
# PyTorch's names for the moments of `moment_shapes`.
_KEYS = {
    "adamw": {"mu": "exp_avg", "nu": "exp_avg_sq"},
    "sgd": {"momentum": "momentum_buffer"},
    "adafactor": {"rows": "row_var", "columns": "col_var", "nu": "variance"},
}
_OTHER = {"row_var": "col_var", "col_var": "row_var"}


def make_optimizer(
    options: Optimizer, decay: Mapping[str, bool], parameters: Tensors
) -> torch.optim.Optimizer:
    """The optimiser; with options, each step sets its learning rate.

    Args:
      options: The optimiser and its settings, or a function that makes one of a list of tensors.
      decay: Whether weight decay applies, by path.
      parameters: The tensors that it changes, by path.

    Raises:
      ValueError: It is neither, or the function makes no optimiser, or one of other tensors.
    """
    if not isinstance(options, OptimizerOptions):
        return _made(options, parameters)
    lr = options.learning_rate
    groups = [
        {
            "params": [p for path, p in parameters.items() if decay[path] == decays],
            "weight_decay": options.weight_decay * decays,
        }
        for decays in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    mesh = mesh_of(parameters.values())
    match options.name:
        case "adamw":
            betas = options.b1, options.b2
            return torch.optim.AdamW(groups, lr, betas, options.eps, fused=True)
        case "sgd":  # the fused kernel takes no split tensors
            return torch.optim.SGD(groups, lr, options.momentum, fused=mesh is None)
        case _:
            return (torch.optim.Adafactor if mesh is None else SplitAdafactor)(
                groups,
                lr,
                beta2_decay=-ADAFACTOR_DECAY,
                eps=(ADAFACTOR_EPS, ADAFACTOR_MIN_SCALE),
                d=ADAFACTOR_CLIP,
            )


def _made(factory: Any, parameters: Tensors) -> torch.optim.Optimizer:
    """The optimiser that a user's own function makes."""
    made = factory(list(parameters.values())) if callable(factory) else None
    if not isinstance(made, torch.optim.Optimizer):
        raise UserError(
            "optimizer must be OptimizerOptions or a function that makes an optimiser of a list of "
            f"tensors, such as functools.partial(torch.optim.AdamW, lr=1e-3), got {factory!r}"
        )
    known = {id(parameter) for parameter in parameters.values()}
    held = [parameter for group in made.param_groups for parameter in group["params"]]
    if any(id(parameter) not in known for parameter in held):
        raise UserError("optimizer must be made of the tensors that the function is given")
    return made


def step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    """A step; an optimiser that asks for `loss` computes loss and gradients anew with it."""
    asked = inspect.signature(optimizer.step).parameters.get("closure")
    if asked is not None and asked.default is inspect.Parameter.empty:
        optimizer.step(torch.enable_grad()(loss))  # pyright: ignore[reportArgumentType, reportCallIssue]
    else:
        optimizer.step()


def get_moments(
    options: Optimizer,
    specs: Sequence[ParamSpec],
    parameters: Tensors,
    optimizer: torch.optim.Optimizer,
) -> dict[str, dict[str, Tensor]]:
    """The optimiser's moments in the Flax layout, by name and path; zeros before the first step.

    Args:
      options: The options or the function that it was made with.
      specs: The parameters that it changes.
      parameters: Their tensors, by path.
      optimizer: The optimiser. One of a user's own gives what it holds, in its own layout.
    """
    if not isinstance(options, OptimizerOptions):
        return {OWN: own_tensors(optimizer, parameters)}
    shapes = moment_shapes(options, specs)

    def moment(name: str, path: str) -> Tensor:
        parameter = parameters[path]
        found = optimizer.state[parameter].get(_key(options, name, path))
        if found is None:
            found = zeros(parameter, torch_shape(path, shapes[name][path]))
        return to_torch(path, found)

    return {name: {path: moment(name, path) for path in paths} for name, paths in shapes.items()}


def set_moments(
    options: Optimizer,
    step: int,
    moments: Mapping[str, Tensors],
    parameters: Tensors,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Gives an optimiser its state after `step` steps, with these moments in the Flax layout.

    Raises:
      ValueError: The tensors of an own optimiser are of another one.
    """
    if not isinstance(options, OptimizerOptions):
        load_own_tensors(optimizer, parameters, moments.get(OWN, {}))
        return
    for path, parameter in parameters.items():
        state = {
            _key(options, name, path): _moment(to_torch(path, tensors[path]), parameter)
            for name, tensors in moments.items()
            if path in tensors
        }
        if options.name != "sgd":
            # PyTorch keeps it on the CPU, except for the fused kernel.
            device = parameter.device if options.name == "adamw" else "cpu"
            state["step"] = torch.tensor(float(step), device=device)
        optimizer.state[parameter] = state


def _moment(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A moment in the dtype and on the devices of its parameter, split as that is."""
    return part_of(tensor.to(parameter.dtype), parameter).to(parameter.device).contiguous()


def _key(options: OptimizerOptions, name: str, path: str) -> str:
    """PyTorch's name for a moment; a transposed parameter's rows are columns."""
    key = _KEYS[options.name][name]
    return _OTHER.get(key, key) if is_kernel(path) else key
