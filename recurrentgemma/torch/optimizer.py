"""The optimisers of `common.training.optimization`, built from PyTorch's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recurrentgemma.common.model.state_dict import is_kernel, to_torch
from recurrentgemma.common.training.optimization import (
    ADAFACTOR_CLIP,
    ADAFACTOR_DECAY,
    ADAFACTOR_EPS,
    ADAFACTOR_MIN_SCALE,
    OptimizerOptions,
)

Tensors = Mapping[str, Tensor]
# PyTorch's names for the moments of `moment_shapes`.
_KEYS = {
    "adamw": {"mu": "exp_avg", "nu": "exp_avg_sq"},
    "sgd": {"momentum": "momentum_buffer"},
    "adafactor": {"rows": "row_var", "columns": "col_var", "nu": "variance"},
}
_OTHER = {"row_var": "col_var", "col_var": "row_var"}


def make_optimizer(
    options: OptimizerOptions, decay: Mapping[str, bool], parameters: Tensors
) -> torch.optim.Optimizer:
    """The optimiser; each step sets its learning rate.

    Args:
      options: The optimiser and its settings.
      decay: Whether weight decay applies, by path.
      parameters: The tensors that it changes, by path.
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
    parameters: Tensors,
    optimizer: torch.optim.Optimizer,
    options: OptimizerOptions,
) -> dict[str, dict[str, Tensor]]:
    """The optimiser's moments in the Flax layout, by name and path; zeros before the first step.

    Args:
      shapes: Their shapes (`moment_shapes`).
      parameters: The tensors that the optimiser changes, by path.
      optimizer: The optimiser.
      options: The options that it was made with.
    """

    def moment(name: str, path: str) -> Tensor:
        parameter = parameters[path]
        found = optimizer.state[parameter].get(_key(options, name, path))
        if found is None:
            return parameter.new_zeros(shapes[name][path])
        return to_torch(path, found)

    return {name: {path: moment(name, path) for path in paths} for name, paths in shapes.items()}


def set_moments(
    step: int,
    moments: Mapping[str, Tensors],
    parameters: Tensors,
    optimizer: torch.optim.Optimizer,
    options: OptimizerOptions,
) -> None:
    """Gives an optimiser its state after `step` steps, with these moments in the Flax layout."""
    for path, parameter in parameters.items():
        state = {
            _key(options, name, path): to_torch(path, tensors[path]).to(parameter).contiguous()
            for name, tensors in moments.items()
            if path in tensors
        }
        if options.name != "sgd":
            # PyTorch keeps it on the CPU, except for the fused kernel.
            device = parameter.device if options.name == "adamw" else "cpu"
            state["step"] = torch.tensor(float(step), device=device)
        optimizer.state[parameter] = state


def _key(options: OptimizerOptions, name: str, path: str) -> str:
    """PyTorch's name for a moment; a transposed parameter's rows are columns."""
    key = _KEYS[options.name][name]
    return _OTHER.get(key, key) if is_kernel(path) else key
