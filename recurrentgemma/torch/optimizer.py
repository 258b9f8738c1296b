"""The optimisers of `common.optimization`, as PyTorch has them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recurrentgemma.common.model.layer_spec import ParamSpec
from recurrentgemma.common.model.state_dict import is_kernel, to_torch
from recurrentgemma.common.training.optimization import (
    ADAFACTOR_CLIP,
    ADAFACTOR_DECAY,
    ADAFACTOR_EPS,
    ADAFACTOR_MIN_SCALE,
    OptimizerOptions,
)

Tensors = Mapping[str, Tensor]
# What PyTorch calls the moments of `common.optimization.moment_shapes`.
_KEYS = {
    "adamw": {"mu": "exp_avg", "nu": "exp_avg_sq"},
    "sgd": {"momentum": "momentum_buffer"},
    "adafactor": {"rows": "row_var", "columns": "col_var", "nu": "variance"},
}
_OTHER = {"row_var": "col_var", "col_var": "row_var"}


def make_optimizer(
    options: OptimizerOptions, decay: Mapping[str, bool], parameters: Tensors
) -> torch.optim.Optimizer:
    """The optimiser; the learning rate is set anew at each step.

    Args:
      options: Which optimiser.
      decay: Whether weight decay applies, by path.
      parameters: What it changes, by path.
    """
    lr = options.learning_rate
    groups = [
        {
            "params": [p for path, p in parameters.items() if decay[path] == decays],
            "weight_decay": options.weight_decay * decays,
        }
        for decays in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    match options.name:
        case "adamw":
            betas = options.b1, options.b2
            return torch.optim.AdamW(groups, lr, betas, options.eps, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr, options.momentum, fused=True)
        case _:
            return torch.optim.Adafactor(
                groups,
                lr,
                beta2_decay=-ADAFACTOR_DECAY,
                eps=(ADAFACTOR_EPS, ADAFACTOR_MIN_SCALE),
                d=ADAFACTOR_CLIP,
            )


def get_moments(
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    specs: Mapping[str, ParamSpec],
    parameters: Tensors,
    optimizer: torch.optim.Optimizer,
    options: OptimizerOptions,
) -> dict[str, dict[str, Tensor]]:
    """What the optimiser remembers, in the Flax layout, by name and path; zeros at first.

    Args:
      shapes: What `moment_shapes` says.
      specs: By path.
      parameters: By path.
      optimizer: On these parameters.
      options: What it was made of.
    """

    def moment(name: str, path: str) -> Tensor:
        parameter = parameters[path]
        found = optimizer.state[parameter].get(_key(options, name, specs[path]))
        if found is None:
            return parameter.new_zeros(shapes[name][path])
        return turned(found, specs[path])

    return {name: {path: moment(name, path) for path in paths} for name, paths in shapes.items()}


def set_moments(
    step: int,
    moments: Mapping[str, Tensors],
    specs: Mapping[str, ParamSpec],
    parameters: Tensors,
    optimizer: torch.optim.Optimizer,
    options: OptimizerOptions,
) -> None:
    """Gives an optimiser the state that it has after so many steps."""
    for path, parameter in parameters.items():
        state = {
            _key(options, name, specs[path]): turned(tensors[path], specs[path])
            .to(parameter)
            .contiguous()
            for name, tensors in moments.items()
            if path in tensors
        }
        if options.name != "sgd":
            # Where torch keeps it: the fused kernel's beside the parameter.
            device = parameter.device if options.name == "adamw" else "cpu"
            state["step"] = torch.tensor(float(step), device=device)
        optimizer.state[parameter] = state


def _key(options: OptimizerOptions, name: str, spec: ParamSpec) -> str:
    """What PyTorch calls a moment of a parameter; rows are columns in a transposed one."""
    key = _KEYS[options.name][name]
    return _OTHER.get(key, key) if is_kernel(spec.path) else key


def turned(tensor: Tensor, spec: ParamSpec) -> Tensor:
    """A parameter, or a moment of it, from the Flax layout to PyTorch's, or back."""
    return to_torch(spec.path, tensor)
