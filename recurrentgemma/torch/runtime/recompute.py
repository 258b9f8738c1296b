"""Gradient checkpointing: the backward pass computes a block's activations again."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from recurrentgemma.torch.blocks import Block


def can_recompute() -> bool:
    """Whether autograd's hooks keep activations: under the transforms of torch.func they do not."""
    return torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()


class RecomputedBlock(Block):
    """A residual block whose activations the backward pass can compute again.

    It does so from the parameters of the forward pass, which need not be the module's own: where
    `torch.func.functional_call` hands in others, they are gone from the module by then. They are
    looked up inside the module's hooks, where those that FSDP splits are whole.
    """

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        segment_pos: Int[Tensor, "b t"],
        cache: Any = None,
        return_cache: bool = True,
        recompute: bool = False,
    ) -> tuple[Float[Tensor, "b t d"], Any]:
        """As `Block`; with `recompute` only the arguments are kept for the gradient."""
        if not recompute:
            return super().forward(x, segment_pos, cache, return_cache)
        # Parameters are inputs of a compiled graph, and what it computes again depends on these.
        run = super().forward if torch.compiler.is_compiling() else self._bound()
        args = (x, segment_pos, cache, return_cache)
        return checkpoint(run, *args, use_reentrant=False)  # pyright: ignore[reportReturnType]

    def _bound(self):
        """The forward pass with the parameters that the module has now."""
        inner = _WithoutHooks(self)
        tensors = dict(inner.named_parameters(remove_duplicate=False))
        tensors |= dict(inner.named_buffers(remove_duplicate=False))

        def run(*args):
            return functional_call(inner, tensors, args, tie_weights=False)

        return run


class _WithoutHooks(nn.Module):
    """The forward pass of a block, without its hooks."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args):
        return Block.forward(self.block, *args)
