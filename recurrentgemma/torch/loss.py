"""The loss of next tokens, computed in chunks: the logits of 256,000 pieces would fill memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recurrentgemma.common.generation.chunks import loss_chunk
from recurrentgemma.torch.runtime.arrays import without_autocast
from recurrentgemma.torch.runtime.teams import ALONE, Team, team_of
from recurrentgemma.torch.scan.gates import forward_levels, wide_dtype

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_VOCABULARY_PART = 16_384


def cross_entropy(
    hidden: Float[Tensor, "b t d"],
    embedding: Float[Tensor, "v d"],
    targets: Int[Tensor, "b t"],
    weights: Float[Tensor, "b t"],
    soft_cap: float = 0.0,
    chunk_size: int | None = None,
    mesh: DeviceMesh | None = None,
) -> Float[Tensor, ""]:
    """The sum over b, t of weights_bt times -log softmax(logits_bt)[targets_bt].

    Logits are `hidden` times the embedding, soft-capped, in float32 or wider; they are computed and
    differentiated so many tokens at a time, in one pass: the gradients, unscaled, are what the
    forward pass leaves behind. Products have their factors in the dtype of `hidden` and
    `embedding`, and sums are wide. Derivatives of the gradients, those in forward mode, and
    torch.func's transforms take all logits at a time, and no mesh that splits the vocabulary.

    Args:
      hidden: The output of `Model.hidden`.
      embedding: The tied embedding.
      targets: The token that follows each; anything where the weight is 0.
      weights: The weight of each target.
      soft_cap: Logits are cap * tanh(logits / cap); as they are if 0.
      chunk_size: Tokens in a chunk, at most; if None so many that its logits take 128 MB.
      mesh: The processes. Along its axis "tensor" each has its rows of `embedding`, and the same
        tokens as the others.
    """
    team = team_of(mesh)
    inputs = (hidden, embedding, targets, weights, soft_cap, chunk_size, team)
    with without_autocast(hidden.device):
        # They accept no in-place operations.
        if torch._C._are_functorch_transforms_active() or forward_levels():
            return _definition(hidden, embedding, weights, targets, soft_cap)
        if not torch.is_grad_enabled():
            return _run(*inputs, needed=(False, False))[0]
        return _CrossEntropy.apply(*inputs)  # pyright: ignore[reportReturnType]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        loss, gradients = _run(*inputs, needed=ctx.needs_input_grad[:2])
        ctx.save_for_backward(*inputs[:4], *gradients)
        ctx.soft_cap, ctx.team = inputs[4], inputs[6]
        return loss

    @staticmethod
    def backward(ctx, dloss):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, embedding, targets, weights, *gradients = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative may follow
            if ctx.team is not ALONE:
                raise NotImplementedError("the loss on a tensor mesh has no second derivative")

            def loss(hidden, embedding, weights):
                return _definition(hidden, embedding, weights, targets, ctx.soft_cap)

            with without_autocast(hidden.device):
                _, pullback = torch.func.vjp(loss, hidden, embedding, weights)  # pyright: ignore[reportAssignmentType]
                dhidden, dembedding, dweights = pullback(dloss)
            return dhidden, dembedding, None, dweights, None, None, None
        scaled = (g if g is None else (dloss * g).to(g.dtype) for g in gradients)
        dhidden, dembedding, dweights = scaled
        return dhidden, dembedding, None, dweights, None, None, None


def _definition(hidden, embedding, weights, targets, soft_cap):
    """The loss in differentiable operations, all tokens at once."""
    wide = wide_dtype(hidden.dtype)
    logits = torch.nn.functional.linear(hidden.to(wide), embedding.to(wide))
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    counted = torch.where(weights == 0, 0, targets.long())
    nll = logits.logsumexp(-1) - logits.gather(-1, counted[..., None])[..., 0]
    return (weights.to(wide) * nll).sum()


def _run(hidden, embedding, targets, weights, soft_cap, chunk_size, team: Team, needed):
    """The loss, and its gradients for `hidden`, `embedding` (where needed) and `weights`."""
    wide, length = wide_dtype(hidden.dtype), targets.numel()
    size = loss_chunk(length, len(embedding), chunk_size)
    # Multiply in parts: a narrower embedding is copied to the wide dtype.
    part = len(embedding) if embedding.dtype == wide else _VOCABULARY_PART
    parts = [slice(i, i + part) for i in range(0, len(embedding), part)]
    loss = hidden.new_zeros((), dtype=wide)
    summed = hidden.dtype if team is ALONE else wide  # the processes' sums, which are added up
    dhidden = torch.empty_like(hidden, dtype=summed).flatten(0, 1) if needed[0] else None
    dembedding = torch.zeros_like(embedding, dtype=wide) if needed[1] else None
    nll = torch.empty_like(weights, dtype=wide).flatten()
    logits = torch.empty(min(size, length), len(embedding), dtype=wide, device=hidden.device)
    counted = torch.where(weights == 0, 0, targets.long())
    rows = hidden.flatten(0, 1), counted.flatten(), weights.flatten().to(wide)
    for chunk in (slice(i, i + size) for i in range(0, length, size)):
        x_cd, target_c, weight_c = (z[chunk] for z in rows)
        x_cd, logits_cv = x_cd.to(wide), logits[: len(x_cd)]
        for p in parts:
            torch.matmul(x_cd, embedding[p].to(wide).T, out=logits_cv[:, p])
        tanh_cv = None
        if soft_cap:
            tanh_cv = logits_cv.div_(soft_cap).tanh_()
            logits_cv = soft_cap * tanh_cv
        target_c, here_c = _here(team, target_c, len(embedding))
        right_c = logits_cv.gather(-1, target_c[:, None])[:, 0].masked_fill(~here_c, 0)
        log_sum_c, right_c = _over_all(team, logits_cv.logsumexp(-1), right_c)
        nll_c = log_sum_c - right_c
        loss += (weight_c * nll_c).sum()
        nll[chunk] = nll_c
        if not any(needed):
            continue
        dlogits_cv = logits_cv.sub_(log_sum_c[:, None]).exp_()
        dlogits_cv.scatter_add_(-1, target_c[:, None], -here_c.to(wide)[:, None])
        dlogits_cv.mul_(weight_c[:, None])
        if tanh_cv is not None:
            dlogits_cv.mul_(tanh_cv.square_().neg_().add_(1))
        dlogits_cv = dlogits_cv.to(hidden.dtype).to(wide)
        if dhidden is not None:
            products = (dlogits_cv[:, p] @ embedding[p].to(wide) for p in parts)
            dhidden[chunk] = sum(products).to(summed)  # pyright: ignore[reportAttributeAccessIssue]
        if dembedding is not None:
            dembedding.addmm_(dlogits_cv.T, x_cd)
    gradients = (
        dhidden if dhidden is None else team.total(dhidden).to(hidden.dtype).view_as(hidden),
        dembedding if dembedding is None else dembedding.to(embedding.dtype),
        nll.view_as(weights).to(weights.dtype),
    )
    return loss, gradients


def _here(team: Team, target_c: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The targets among this process's rows of the embedding, and which these are."""
    if team is ALONE:
        return target_c, torch.ones_like(target_c, dtype=torch.bool)
    local_c = target_c - team.index * rows
    here_c = (local_c >= 0) & (local_c < rows)
    return local_c.masked_fill(~here_c, 0), here_c


def _over_all(team: Team, log_sum_c: Tensor, right_c: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the sum over the whole vocabulary, and the logits of the targets."""
    if team is ALONE:
        return log_sum_c, right_c
    sums_ct, rights_ct = team.joined(torch.stack([log_sum_c, right_c])[..., None])
    return sums_ct.logsumexp(-1), rights_ct.sum(-1)
