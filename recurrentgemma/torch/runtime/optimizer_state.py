"""The state of any of PyTorch's optimisers as tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recurrentgemma.common.errors import UserError

_GROUPS = "groups"  # "groups.N.name": a number of a group of parameters, such as its learning rate


def own_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What an optimiser holds: "<path>.<its name>", and the numbers of its groups.

    Raises:
      ValueError: It holds more than tensors and numbers.
    """
    found: dict[str, Any] = {}
    for path, parameter in parameters.items():
        for name, value in optimizer.state.get(parameter, {}).items():
            found[f"{path}.{name}"] = value
    for number, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if _is_number(value) or (isinstance(value, tuple) and all(map(_is_number, value))):
                found[f"{_GROUPS}.{number}.{name}"] = value
    others = [name for name, v in found.items() if not isinstance(v, Tensor | int | float | tuple)]
    if others:
        raise UserError(
            f"the state of {type(optimizer).__name__} is no set of tensors: save "
            f"optimizer_state.state_dict() instead; it holds {', '.join(others[:3])}"
        )
    return {
        name: value if isinstance(value, Tensor) else torch.tensor(value, dtype=_wide(value))
        for name, value in found.items()
    }


def load_own_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    """Gives an optimiser what `own_tensors` returned, cast to the dtypes of its parameters.

    Raises:
      ValueError: A name is no parameter's.
    """
    place = {id(p): path for path, p in parameters.items()}
    stored = optimizer.state_dict()
    numbers: dict[str, int] = {}  # of a parameter in the state dict, by its path
    for group, saved in zip(optimizer.param_groups, stored["param_groups"], strict=True):
        ids = zip(group["params"], saved["params"], strict=True)
        numbers |= {place[id(parameter)]: number for parameter, number in ids}
    state: dict[int, dict[str, Any]] = {}
    for full, tensor in tensors.items():
        path, _, name = full.rpartition(".")
        head, _, number = path.partition(".")
        if head == _GROUPS and number.isdigit() and int(number) < len(stored["param_groups"]):
            stored["param_groups"][int(number)][name] = _like(tensor, optimizer, int(number), name)
        elif path in numbers:
            state.setdefault(numbers[path], {})[name] = _plain(tensor)
        else:
            raise UserError(f"the optimiser has no parameter to which {full} belongs")
    optimizer.load_state_dict({**stored, "state": state})


def _is_number(value: Any) -> bool:
    one = isinstance(value, Tensor) and value.numel() == 1
    return one or (isinstance(value, int | float) and not isinstance(value, bool))


def _wide(value: Any) -> torch.dtype:
    """The dtype that tells numbers of Python's from tensors of one element, which are narrower."""
    values = value if isinstance(value, tuple) else (value,)
    return torch.int64 if all(isinstance(v, int) for v in values) else torch.float64


def _plain(tensor: Tensor) -> Any:
    """A number of Python's where it was one."""
    one = tensor.ndim == 0 and tensor.dtype in (torch.int64, torch.float64)
    return tensor.item() if one else tensor


def _like(tensor: Tensor, optimizer: torch.optim.Optimizer, number: int, name: str) -> Any:
    """A group's number in the type that the group has."""
    old = optimizer.param_groups[number].get(name)
    if isinstance(old, Tensor):
        return tensor.to(old)
    return tuple(tensor.tolist()) if tensor.ndim else tensor.item()
