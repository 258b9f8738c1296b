"""The loss of next tokens, computed in chunks: the logits of 256,000 pieces would fill memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recurrentgemma.common.generation.chunks import loss_chunk
from recurrentgemma.jax.runtime.promotion import default_promotion
from recurrentgemma.jax.scan.gates import wide_dtype
from recurrentgemma.jax.scan.tangents import Linear, linear


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden: Float[Array, "b t d"],
    embedding: Float[Array, "v d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    soft_cap: float = 0.0,
    chunk_size: int | None = None,
) -> Float[Array, ""]:
    """The sum over b, t of weights_bt times -log softmax(logits_bt)[targets_bt].

    Logits are `hidden` times the embedding, soft-capped, in float32 or wider; they are computed and
    differentiated so many tokens at a time, in one pass: the gradients, unscaled, are what the
    forward pass leaves behind. Products have their factors in the dtype of `hidden` and
    `embedding`, and sums are wide.

    Args:
      hidden: The output of `Model.hidden`.
      embedding: The tied embedding.
      targets: The token that follows each; anything where the weight is 0.
      weights: The weight of each target.
      soft_cap: Logits are cap * tanh(logits / cap); as they are if 0.
      chunk_size: Tokens in a chunk, at most; if None so many that its logits take 128 MB.
    """
    return _run(hidden, embedding, targets, weights, soft_cap, chunk_size, gradients=False)[0]


@cross_entropy.defjvp
@default_promotion
def _jvp(soft_cap, chunk_size, primals, tangents):
    loss, gradients = _run(*primals, soft_cap, chunk_size, gradients=True)
    dhidden, dembedding, _, dweights = tangents
    return loss, linear(_ALONG, _SCALED, gradients, (dhidden, dembedding, dweights))


@default_promotion
def _along(gradients, tangents):
    wide = wide_dtype(gradients[0].dtype)
    return sum((g.astype(wide) * t).sum() for g, t in zip(gradients, tangents, strict=True))


@default_promotion
def _scaled(gradients, dloss):
    return tuple((dloss * g).astype(g.dtype) for g in gradients)


_ALONG = Linear(_along, _along, lambda g, _: jnp.zeros((), wide_dtype(g[0].dtype)))
_SCALED = Linear(_scaled, _scaled, lambda g, _: g)


@default_promotion
def _run(hidden, embedding, targets, weights, soft_cap, chunk_size, gradients):
    """The loss, and its gradients for `hidden`, `embedding` and `weights` (or None)."""
    wide, length = wide_dtype(hidden.dtype), targets.size
    size = loss_chunk(length, len(embedding), chunk_size)

    def chunks(x):
        x = x.reshape(length, *x.shape[2:])
        padding = ((0, -length % size), *((0, 0),) * (x.ndim - 1))
        return jnp.pad(x, padding).reshape(-1, size, *x.shape[1:])

    def step(carry, chunk):
        loss, dembedding = carry
        x_cd, target_c, weight_c = chunk
        logits_cv = jnp.matmul(x_cd, embedding.T, preferred_element_type=wide)
        tanh_cv = None
        if soft_cap:
            tanh_cv = jnp.tanh(logits_cv / soft_cap)
            logits_cv = soft_cap * tanh_cv
        log_sum_c = jax.nn.logsumexp(logits_cv, -1)
        nll_c = log_sum_c - jnp.take_along_axis(logits_cv, target_c[:, None], -1)[:, 0]
        loss = loss + (weight_c * nll_c).sum()
        if not gradients:
            return (loss, dembedding), None
        dlogits_cv = jnp.exp(logits_cv - log_sum_c[:, None])
        dlogits_cv = dlogits_cv - (target_c[:, None] == jnp.arange(len(embedding)))
        dlogits_cv = dlogits_cv * weight_c[:, None]
        if tanh_cv is not None:
            dlogits_cv = dlogits_cv * (1 - tanh_cv**2)
        dlogits_cv = dlogits_cv.astype(hidden.dtype)
        dx_cd = jnp.matmul(dlogits_cv, embedding, preferred_element_type=wide)
        dembedding += jnp.matmul(dlogits_cv.T, x_cd, preferred_element_type=wide)
        return (loss, dembedding), (dx_cd.astype(hidden.dtype), nll_c)

    start = jnp.zeros((), wide), jnp.zeros(embedding.shape if gradients else (), wide)
    counted = jnp.where(weights == 0, 0, targets)
    xs = chunks(hidden), chunks(counted), chunks(weights.astype(wide))
    (loss, dembedding), per_token = jax.lax.scan(step, start, xs)
    if per_token is None:
        return loss, None
    dhidden, nll = (
        z.reshape(-1, *z.shape[2:])[:length].reshape(*targets.shape, *z.shape[2:])
        for z in per_token
    )
    return loss, (dhidden, dembedding.astype(embedding.dtype), nll.astype(weights.dtype))
