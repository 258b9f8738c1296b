"""The tiny model's optimizer: Muon for the matrices, AdamW for everything else.

A small model on a small budget is short of steps, not of memory. Muon (Jordan et al., 2024) makes
more of each: it takes the momentum of a weight matrix and replaces it by the nearest matrix whose
singular values are all equal, so rare directions move as fast as frequent ones. PyTorch's own
`torch.optim.Muon` takes two-dimensional parameters only; Griffin's gates and gated MLP are stacks
of matrices, hence this one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from recurrentgemma.common.layer_spec import ParamSpec

# The quintic of Jordan et al.: its iteration takes singular values in (0, 1] to around 1.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Moves the singular values of `matrices [..., m, n]` to around 1, by Newton-Schulz steps.

    One step is `X <- a X + b (X X^T) X + c (X X^T)^2 X`, which maps each singular value s to
    `a s + b s^3 + c s^5` and leaves the singular vectors alone.
    """
    a, b, c = QUINTIC
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT  # so that X X^T is the smaller Gram matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for parameters whose last two axes are a matrix.

    The update is scaled by `0.2 sqrt(max(m, n))`, which gives it the root mean square of a typical
    AdamW update (Liu et al., 2025): both optimizers share one learning rate and weight decay.
    """

    def __init__(
        self,
        groups: Iterable[dict],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        newton_schulz_steps: int = 5,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(groups, defaults | {"newton_schulz_steps": newton_schulz_steps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(average, group["momentum"])  # Nesterov
                update = orthogonalize(ahead, group["newton_schulz_steps"])
                scale = 0.2 * max(parameter.shape[-2:]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(
    model: nn.Module, specs: Iterable[ParamSpec], lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon over the matrices that LoRA would target, AdamW over embedding, norms, biases, conv.

    Which parameters decay, and which are matrices, the layer spec says.
    """
    parameters = dict(model.named_parameters())
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for spec in specs:
        key = (spec.lora is not None, spec.decay)
        groups.setdefault(key, []).append(parameters[spec.torch.name])

    def of(is_matrix: bool) -> list[dict]:
        return [
            {"params": members, "weight_decay": weight_decay if decay else 0.0}
            for (matrix, decay), members in groups.items()
            if matrix == is_matrix
        ]

    return [Muon(of(True), lr=lr), torch.optim.AdamW(of(False), lr=lr, betas=(0.9, 0.95))]
