"""Attention of one query in bfloat16 on a CPU over keys and one more, by PyTorch's own kernel.

As the operators in `kernels`, its private one is looked up by name, and its results are compared
with exact ones before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recurrentgemma.torch.runtime.kernels import extremes, works


def takes(q: Tensor, keys: Tensor) -> bool:
    """Whether `attend` works, and takes such queries and keys."""
    return q.dtype == keys.dtype == torch.bfloat16 and keys.is_cpu and attention_works()


def attend(
    q_bkrh: Tensor,
    many: Sequence[Tensor],
    one: Sequence[Tensor],
    sees_bs: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention in bfloat16 over S keys, those that a mask lets a row see, and one more.

    PyTorch's kernel also gives the logarithm of its sum of exponentials, beside which that of one
    more key is weighed: so the keys need not be joined.

    Args:
      q_bkrh: The queries, R for each key head.
      many: The S keys and their values, [B, K, S, H].
      one: The other key and its value, [B, K, 1, H].
      sees_bs: The mask, [B, S]; without one a row sees all keys.
      scale: The factor of the scores.
    """
    mask = None
    if sees_bs is not None:
        mask = torch.zeros(sees_bs.shape, dtype=q_bkrh.dtype, device="cpu")
        # Not infinity: a row that sees none of the keys is defined too.
        mask = mask.masked_fill_(~sees_bs, torch.finfo(mask.dtype).min)[:, None, None]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, total = kernel(q_bkrh, *many, attn_mask=mask, scale=scale)
    score_bkr1 = q_bkrh.float() @ (one[0].float() * scale).mT
    share = torch.sigmoid(score_bkr1 - total[..., None])
    return torch.lerp(out.float(), one[1].float(), share).to(q_bkrh.dtype)


@works
def attention_works() -> bool:
    """Whether `attend` is as exact as bfloat16, with a mask and without."""
    q, k, v = (extremes(rows, 64).view(1, 1, rows, 64).bfloat16() / 32 for rows in (6, 33, 33))
    sees = torch.arange(32, device="cpu")[None] % 3 > 0
    for seen in (None, sees, sees & False):
        found = attend(q, (k[:, :, 1:], v[:, :, 1:]), (k[:, :, :1], v[:, :, :1]), seen, 0.125)
        scores = q.double() @ k.double().mT * 0.125
        if seen is not None:
            hidden = torch.cat([~seen[:, :1] & False, ~seen], 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        error = (found.double() - scores.softmax(-1) @ v.double()).abs().max()
        if not error <= 2**-7 * v.abs().max():
            return False
    return True
