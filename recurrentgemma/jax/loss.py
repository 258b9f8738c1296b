"""The loss of next tokens, computed in chunks: the logits of 256,000 pieces would fill memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from recurrentgemma.common.generation.chunks import loss_chunk
from recurrentgemma.jax.runtime.promotion import default_promotion
from recurrentgemma.jax.runtime.vocabulary import TableSplit, around, passed, table_split
from recurrentgemma.jax.scan.gates import wide_dtype
from recurrentgemma.jax.scan.tangents import Linear, linear


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    hidden: Float[Array, "b t d"],
    embedding: Float[Array, "v d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    soft_cap: float = 0.0,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """The sum over b, t of weights_bt times -log softmax(logits_bt)[targets_bt].

    Logits are `hidden` times the embedding, soft-capped, in float32 or wider; they are computed and
    differentiated so many tokens at a time, in one pass: the gradients, unscaled, are what the
    forward pass leaves behind. Products have their factors in the dtype of `hidden` and
    `embedding`, and sums are wide.

    On a mesh each device computes its tokens, or its part of the vocabulary. If the devices that
    split the vocabulary have tokens of their own ("fsdp", "sequence"), its slices go around twice,
    first for the sums and then for the gradients, which computes the logits again.

    Args:
      hidden: The output of `Model.hidden`.
      embedding: The tied embedding.
      targets: The token that follows each; anything where the weight is 0.
      weights: The weight of each target.
      soft_cap: Logits are cap * tanh(logits / cap); as they are if 0.
      chunk_size: Tokens in a chunk, at most; if None so many that its logits take 128 MB.
      mesh: The devices that the arrays are split over, if any.
    """
    settings = soft_cap, chunk_size, mesh
    return _run(hidden, embedding, targets, weights, *settings, gradients=False)[0]


@cross_entropy.defjvp
@default_promotion
def _jvp(soft_cap, chunk_size, mesh, primals, tangents):
    hidden, embedding, targets, weights = primals
    settings = soft_cap, chunk_size, mesh
    loss, gradients = _run(hidden, embedding, targets, weights, *settings, gradients=True)
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
def _run(hidden, embedding, targets, weights, soft_cap, chunk_size, mesh, gradients):
    """The loss, and its gradients for `hidden`, `embedding` and `weights` (or None)."""
    arrays = [jnp.asarray(array) for array in (hidden, embedding, targets, weights)]
    settings = {"soft_cap": soft_cap, "chunk_size": chunk_size, "gradients": gradients}
    run: Any = functools.partial(_local, **settings)
    if mesh is None:
        return run(*arrays)
    split = table_split(mesh, embedding.shape, targets.shape)
    run = functools.partial(run, split=split)
    tokens, table = split.tokens, split.table
    return jax.shard_map(
        run,
        mesh=split.mesh,
        in_specs=(tokens, table, tokens, tokens),
        out_specs=(PartitionSpec(), (tokens, table, tokens) if gradients else None),
        check_vma=False,
    )(*arrays)


class _Chunk(NamedTuple):
    """Some tokens: their hidden states, targets and weights."""

    x_cd: Array
    target_c: Array
    weight_c: Array


def _local(
    hidden: Array,
    embedding: Array,
    targets: Array,
    weights: Array,
    soft_cap: float,
    chunk_size: int | None,
    gradients: bool,
    split: TableSplit | None = None,
) -> tuple[Array, Any]:
    """`_run` on one device of a split: its tokens, its slice of the table."""
    wide, length = wide_dtype(hidden.dtype), targets.size
    table = embedding if split is None else split.gathered(embedding)
    shared, ring = (None, None) if split is None else (split.shared, split.ring)
    size = loss_chunk(length, len(table), chunk_size)

    def chunks(x: Array) -> Array:
        x = x.reshape(length, *x.shape[2:])
        padding = ((0, -length % size), *((0, 0),) * (x.ndim - 1))
        return jnp.pad(x, padding).reshape(-1, size, *x.shape[1:])

    def flat(z: Array) -> Array:
        """The tokens of all chunks, [B, T, ...]."""
        z = z.reshape(-1, *z.shape[2:])[:length]
        return z.reshape(*targets.shape, *z.shape[1:])

    counted = jnp.where(weights == 0, 0, targets)
    xs = _Chunk(chunks(hidden), chunks(counted), chunks(weights.astype(wide)))
    logits = functools.partial(_logits, soft_cap=soft_cap, wide=wide)
    if ring is None:
        first = 0 if shared is None else lax.axis_index(shared) * len(table)
        summed = _summed(shared)

        def step(dtable: Array, chunk: _Chunk):
            logits_cv, slope_cv = logits(chunk, table)
            log_sum_c = summed(jax.nn.logsumexp(logits_cv, -1))
            right_c = _right(logits_cv, chunk.target_c - first)
            nll_c = log_sum_c - (right_c if shared is None else lax.psum(right_c, shared))
            if not gradients:
                return dtable, (None, nll_c)
            dx_cd, added = _gradients(chunk, table, first, logits_cv, slope_cv, log_sum_c, wide)
            dx_cd = dx_cd if shared is None else lax.psum(dx_cd, shared)
            return dtable + added, (dx_cd.astype(hidden.dtype), nll_c)

        start = jnp.zeros(table.shape if gradients else (), wide)
        dtable, (dx, nll) = lax.scan(step, start, xs)
    else:
        log_sum, right = _ring_sums(ring, table, xs, logits)
        dx: Any = None
        dtable: Any = None
        nll = log_sum - right
        if gradients:
            dx, dtable = _ring_gradients(ring, table, xs, log_sum, logits, wide)
            dx = dx.astype(hidden.dtype)
    loss = (xs.weight_c * nll).sum(1).sum()
    if split is not None:
        loss = lax.psum(loss, split.axes)
    if not gradients:
        return loss, None
    if split is not None:
        if split.width:
            dtable = lax.psum_scatter(dtable, split.width, scatter_dimension=1, tiled=True)
        rest = tuple(axis for axis in split.axes if axis not in (ring, split.width))
        dtable = lax.psum(dtable, rest)
    nll = flat(nll)
    return loss, (flat(dx), dtable.astype(embedding.dtype), nll.astype(weights.dtype))


def _logits(chunk: _Chunk, table: Array, soft_cap: float, wide: Any) -> tuple[Array, Array | None]:
    """The logits of a slice of the vocabulary, and the slope of their soft cap."""
    logits_cv = jnp.matmul(chunk.x_cd, table.T, preferred_element_type=wide)
    if not soft_cap:
        return logits_cv, None
    tanh_cv = jnp.tanh(logits_cv / soft_cap)
    return soft_cap * tanh_cv, 1 - tanh_cv**2


def _right(logits_cv: Array, local_c: Array) -> Array:
    """The logits of the targets, 0 where they are in another slice."""
    inside = (local_c >= 0) & (local_c < logits_cv.shape[-1])
    index = jnp.where(inside, local_c, 0)
    return jnp.where(inside, jnp.take_along_axis(logits_cv, index[:, None], -1)[:, 0], 0)


def _gradients(
    chunk: _Chunk,
    table: Array,
    first: Any,
    logits_cv: Array,
    slope_cv: Array | None,
    log_sum_c: Array,
    wide: Any,
) -> tuple[Array, Array]:
    """What a slice adds to the gradients for the tokens, and the gradient for the slice."""
    dlogits_cv = jnp.exp(logits_cv - log_sum_c[:, None])
    dlogits_cv = dlogits_cv - ((chunk.target_c - first)[:, None] == jnp.arange(len(table)))
    dlogits_cv = dlogits_cv * chunk.weight_c[:, None]
    if slope_cv is not None:
        dlogits_cv = dlogits_cv * slope_cv
    dlogits_cv = dlogits_cv.astype(chunk.x_cd.dtype)
    dx_cd = jnp.matmul(dlogits_cv, table, preferred_element_type=wide)
    return dx_cd, jnp.matmul(dlogits_cv.T, chunk.x_cd, preferred_element_type=wide)


def _summed(axis: str | None) -> Callable[[Array], Array]:
    """From the logarithm of a device's sum to that of all devices'."""

    def over(log_sum_c: Array) -> Array:
        largest = lax.pmax(log_sum_c, axis)
        return largest + jnp.log(lax.psum(jnp.exp(log_sum_c - largest), axis))

    return (lambda log_sum_c: log_sum_c) if axis is None else over


def _ring_sums(axis: str, table: Array, xs: _Chunk, logits: Any) -> tuple[Array, Array]:
    """The logarithms of the sums, and the logits of the targets, by chunk."""

    def body(carry: tuple[Array, Array], table: Array, first: Array) -> tuple[Array, Array]:
        def step(_, x):
            chunk, log_sum_c, right_c = x
            logits_cv, _ = logits(chunk, table)
            log_sum_c = jnp.logaddexp(log_sum_c, jax.nn.logsumexp(logits_cv, -1))
            return None, (log_sum_c, right_c + _right(logits_cv, chunk.target_c - first))

        return lax.scan(step, None, (xs, *carry))[1]

    zeros = jnp.zeros_like(xs.weight_c)
    return around(axis, table, body, (zeros - jnp.inf, zeros))


def _ring_gradients(
    axis: str, table: Array, xs: _Chunk, log_sum: Array, logits: Any, wide: Any
) -> tuple[Array, Array]:
    """The gradients for the tokens, by chunk, and for this device's slice, which goes around."""

    def body(carry: tuple[Array, Array], table: Array, first: Array) -> tuple[Array, Array]:
        def step(dtable, x):
            chunk, log_sum_c, dx_cd = x
            logits_cv, slope_cv = logits(chunk, table)
            added_cd, added = _gradients(chunk, table, first, logits_cv, slope_cv, log_sum_c, wide)
            return dtable + added, dx_cd + added_cd

        dx, dtable = carry
        dtable, dx = lax.scan(step, dtable, (xs, log_sum, dx))
        return dx, passed(dtable, axis)

    start = jnp.zeros(xs.x_cd.shape, wide), jnp.zeros(table.shape, wide)
    return around(axis, table, body, start)
