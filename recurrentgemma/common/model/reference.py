"""The model in NumPy float64: its executable definition, and the oracle of its tests.

Slow, plain and complete. Every piece below the batch works on one row: a sequence of tokens
without padding, whose `positions` count from 0 in each document. `over_rows` removes the padding,
so that padding cannot change anything, and puts the rows together again.

Sizes: B rows, T tokens, V vocabulary, D width, L recurrent width, M expanded width of the MLP,
N query heads, K key heads, H head size, S keys. Parameters are a flat mapping from the layer spec's
paths to arrays in the Flax layout. Functions that take `params` expect paths relative to their own
module; `subtree` gives those.

The numerics ledger. All arithmetic here is float64; where the twins must be wider than their
compute dtype, the entry says so.

*   Embedding: the table is tied to the decoder. A Griffin's scale is sqrt(D) rounded to bfloat16,
    nearest even (`to_bfloat16`): 50.5 for D = 2560. A Gemma's is sqrt(D). Twins: the scale is
    rounded to the compute dtype, then multiplied. The decoder reads the table unscaled.
*   RMSNorm: eps is `RMS_EPS` = 1e-6, inside the root; the weight is 1 + scale. Twins: float32.
*   Gelu: the tanh form, with sqrt(2 / pi) and 0.044715.
*   MLP: gelu on half 0 of `ffw_up`, times half 1.
*   Attention: N / K query heads share a key head; queries are multiplied by `scale`. A query sees
    its own key and the `reach` before it: W + 1 keys in Griffin. The soft cap of scores comes after
    the scale and before the mask. QK-norm comes before RoPE. Twins: scores, cap and softmax in
    float32.
*   RoPE: the first R = H * share dimensions of each head turn, as two halves of R / 2, at
    frequencies base ** (-2 i / R), by the position in the document / stretch. Griffin: share 1/2,
    base 10000. Twins: angles in float32.
*   Convolution: w[-1] multiplies the current input, w[0] the oldest. Griffin: 4 taps.
*   RG-LRU: log a = -`RG_LRU_C` * r * softplus(a_param) with c = 8; sqrt(1 - a^2) is
    sqrt(-expm1(2 log a)). At position 0 the state is forgotten and that multiplier is 1. Twins:
    gates, scan and state in float32; the gradient of the square root is clipped at 1000.
*   Segments: position 0 starts a document, and nothing crosses it: neither the RG-LRU, nor the
    convolution, nor attention. Position -1 is padding: no state changes, logits are zeros.
*   Logits: tanh(x / c) * c with the soft cap c, where c is not 0. Twins: float32.

The state is canonical: any split of the same tokens into chunks ends in the same arrays.

*   `rg_lru_state` [B, L]: h after the last token.
*   `conv1d_state` [B, taps - 1, L]: the last inputs of the convolution in the current document,
    oldest first, zeros where the document has had fewer.
*   `keys` (turned by RoPE) and `values` [B, S, K, H]: position p of the current document is in slot
    p % S. Only its latest S tokens are kept; every other slot is zero. S is the reach, or without a
    limit of the reach the capacity, which no document may exceed.
*   `num_tokens` [B], int32: how many tokens of the current document have been seen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.config import Config, Layer
from recurrentgemma.common.model.layer_spec import layer_spec, require_match
from recurrentgemma.common.model.mixers import Attention, Recurrent, Rope, block_name
from recurrentgemma.common.model.numerics import RG_LRU_C, RMS_EPS
from recurrentgemma.common.model.state import init_cache, require_room

Array = np.ndarray
Params = Mapping[str, np.ndarray]
State = dict[str, dict[str, np.ndarray]]
Row = Float[np.ndarray, "t d"]
Positions = Int[np.ndarray, "t"]
BlockState = Mapping[str, np.ndarray]

_f64 = functools.partial(np.asarray, dtype=np.float64)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow and to full relative precision on both sides."""
    small = np.exp(-np.abs(_f64(x)))
    return np.where(_f64(x) >= 0, 1, small) / (1 + small)


def softplus(x: Array) -> Array:
    """log(1 + exp(x)), without overflow."""
    return np.logaddexp(_f64(x), 0)


def gelu_tanh(x: Array) -> Array:
    """The tanh form of gelu: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    x = _f64(x)
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rms_norm(
    x: Float[Array, "*b d"], scale: Float[Array, "d"], eps: float = RMS_EPS
) -> Float[Array, "*b d"]:
    """RMSNorm: y = x / sqrt(mean(x^2) + eps) * (1 + scale)."""
    x = _f64(x)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * (1 + _f64(scale))


def linear(params: Params, x: Float[Array, "*b i"]) -> Float[Array, "*b j"]:
    """A dense layer: y = x @ kernel + bias, where there is a bias."""
    return _f64(x) @ _f64(params["kernel"]) + _f64(params.get("bias", 0.0))


def block_diagonal_linear(
    x: Float[Array, "*b l"], w: Float[Array, "n i i"], b: Float[Array, "n i"]
) -> Float[Array, "*b l"]:
    """Dense layers on the n equal parts of x's last axis: y[n] = x[n] @ w[n] + b[n]."""
    heads, size, _ = w.shape
    parts = _f64(x).reshape(*x.shape[:-1], heads, size)
    y = np.einsum("...ni,nij->...nj", parts, _f64(w)) + _f64(b)
    return y.reshape(x.shape)


def linear_scan(
    x: Float[Array, "*b t l"],
    a: Float[Array, "*b t l"],
    h0: Float[Array, "*b l"] | None = None,
    reset: Bool[Array, "*b t"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Array, "*b t l"], Float[Array, "*b l"]]:
    """All h_t = a_t * h_(t-1) + x_t, with a_t = 0 where reset; and the h computed last.

    With `reverse`, time runs from the last step to the first: h_t = a_t * h_(t+1) + x_t.
    """
    x, a = _f64(x), _f64(a)
    steps = range(x.shape[-2])
    h = np.zeros(x.shape[:-2] + x.shape[-1:]) if h0 is None else _f64(h0).copy()
    y = np.empty_like(x)
    for t in reversed(steps) if reverse else steps:
        forget = False if reset is None else reset[..., t, None]
        h = np.where(forget, 0, a[..., t, :] * h) + x[..., t, :]
        y[..., t, :] = h
    return y, h


def _documents(history: int, positions: Positions) -> Int[Array, "s"]:
    """Which document each token belongs to; 0, for one begun earlier, for all of the history."""
    return np.concatenate([np.zeros(history, np.int64), np.cumsum(positions == 0)])


def conv_1d(
    x: Float[Array, "t l"],
    w: Float[Array, "taps l"],
    b: Float[Array, "l"],
    positions: Positions,
    state: Float[Array, "p l"],
) -> tuple[Float[Array, "t l"], Float[Array, "p l"]]:
    """Causal depthwise convolution: y_t = b + sum over k of w[taps - 1 - k] * x_(t-k).

    Inputs of other documents count as zeros.
    """
    past, length = len(w) - 1, len(x)
    inputs = np.concatenate([_f64(state), _f64(x)])
    document = _documents(past, positions)
    y = np.zeros_like(inputs[past:]) + _f64(b)
    for k in range(len(w)):
        back = slice(past - k, past - k + length)
        inside = document[back] == document[past:]
        y += _f64(w)[past - k] * np.where(inside[:, None], inputs[back], 0)
    last = slice(len(inputs) - past, None)
    return y, np.where((document[last] == document[-1])[:, None], inputs[last], 0)


def rg_lru_scan(
    x: Float[Array, "*b t l"],
    input_gate: Float[Array, "*b t l"],
    a_gate: Float[Array, "*b t l"],
    a_param: Float[Array, "l"],
    segment_pos: Int[Array, "*b t"],
    h0: Float[Array, "*b l"] | None = None,
) -> tuple[Float[Array, "*b t l"], Float[Array, "*b l"]]:
    """The RG-LRU past its linear maps: all h_t, and the last; the gates come before the sigmoid.

    At padding (position -1) the state stays as it is.
    """
    start, padding = (segment_pos == 0)[..., None], (segment_pos < 0)[..., None]
    log_a = -RG_LRU_C * sigmoid(a_gate) * softplus(a_param)
    multiplier = np.where(start, 1, np.sqrt(-np.expm1(2 * log_a)))
    gated_x = np.where(padding, 0, multiplier * sigmoid(input_gate) * _f64(x))
    return linear_scan(gated_x, np.where(padding, 1, np.exp(log_a)), h0, segment_pos == 0)


def rg_lru(
    params: Params, x: Float[Array, "t l"], positions: Positions, h0: Float[Array, "l"]
) -> tuple[Float[Array, "t l"], Float[Array, "l"]]:
    """The Real-Gated Linear Recurrent Unit (arXiv 2402.19427, section 2.4).

    r_t = sigmoid(a_gate(x_t)), i_t = sigmoid(input_gate(x_t)), log a_t = -c r_t softplus(a_param),
    h_t = a_t h_(t-1) + sqrt(1 - a_t^2) i_t x_t; where a document starts, h_t = i_t x_t.
    """
    input_gate, a_gate = (
        block_diagonal_linear(x, params[f"{gate}.w"], params[f"{gate}.b"])
        for gate in ("input_gate", "a_gate")
    )
    return rg_lru_scan(x, input_gate, a_gate, params["a_param"], positions, h0)


def recurrent_block(
    mixer: Recurrent, params: Params, x: Row, positions: Positions, state: BlockState
) -> tuple[Row, dict[str, Array]]:
    """linear_out(gelu(linear_y(x)) * rg_lru(conv_1d(linear_x(x))))."""
    del mixer  # the shapes of the parameters say it all
    y = gelu_tanh(linear(subtree(params, "linear_y"), x))
    x = linear(subtree(params, "linear_x"), x)
    w, b = params["conv_1d.w"], params["conv_1d.b"]
    x, conv1d_state = conv_1d(x, w, b, positions, state["conv1d_state"])
    x, rg_lru_state = rg_lru(subtree(params, "rg_lru"), x, positions, state["rg_lru_state"])
    new_state = {"rg_lru_state": rg_lru_state, "conv1d_state": conv1d_state}
    return linear(subtree(params, "linear_out"), x * y), new_state


def apply_rope(x: Float[Array, "*b t n h"], positions: Int[Array, "*b t"], rope: Rope) -> Array:
    """Turns the first R = H * share dimensions of each head: (x1 cos - x2 sin, x2 cos + x1 sin).

    x1 and x2 are the two halves of those. The angle of dimension i of either is
    position / stretch * base ** (-2 i / R).
    """
    turned = int(x.shape[-1] * rope.share)
    x1, x2, rest = np.split(_f64(x), [turned // 2, turned], axis=-1)
    frequency = rope.base ** (-2 * np.arange(turned // 2) / max(turned, 1))
    angle = positions[..., None, None] / rope.stretch * frequency
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)


def attend(
    q: Float[Array, "t n h"],
    k: Float[Array, "s kv h"],
    v: Float[Array, "s kv h"],
    mask: Bool[Array, "t s"],
    scale: float,
    cap: float = 0.0,
) -> Float[Array, "t n h"]:
    """softmax(soft_cap(scale * q @ k^T)) @ v over the keys that the mask admits.

    Query head n uses key head n // (N / K).
    """
    q_tkgh = _f64(q).reshape(len(q), k.shape[1], -1, q.shape[-1])
    scores = soft_cap(np.einsum("tkgh,skh->tkgs", q_tkgh * scale, _f64(k)), cap)
    scores = np.where(mask[:, None, None, :], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("tkgs,skh->tkgh", weights, _f64(v)).reshape(q.shape)


def attention_block(
    mixer: Attention, params: Params, x: Row, positions: Positions, state: BlockState
) -> tuple[Row, dict[str, Array]]:
    """proj_final(attend(rope(norm(proj_q(x))), rope(norm(proj_k(x))), proj_v(x))).

    A query at position p of a document admits the keys of that document at p - reach ... p.
    """
    x = _f64(x)
    if not len(x):
        return x, dict(state)
    slots = len(state["keys"])
    if mixer.reach is None:
        require_room(slots, int(positions.max()) + 1)

    def heads(name: str, number: int) -> Array:
        out = linear(subtree(params, f"proj_{name}"), x)
        return out.reshape(len(x), number, mixer.head_dim)

    q, k, v = heads("q", mixer.heads), heads("k", mixer.kv_heads), heads("v", mixer.kv_heads)
    if mixer.qk_norm:
        q = rms_norm(q, params["q_norm.scale"])
        k = rms_norm(k, params["k_norm.scale"])
    q, k = apply_rope(q, positions, mixer.rope), apply_rope(k, positions, mixer.rope)

    # The history, if the first token continues it: the tokens before that one, by position.
    seen = int(state["num_tokens"]) if positions[0] > 0 else 0
    kept = min(seen, slots)
    past = np.arange(positions[0] - kept, positions[0])
    k = np.concatenate([_f64(state["keys"])[past % slots], k])
    v = np.concatenate([_f64(state["values"])[past % slots], v])
    position = np.concatenate([past, positions])
    document = _documents(kept, positions)

    distance = positions[:, None] - position
    mask = (document[kept:, None] == document) & (distance >= 0)
    if mixer.reach is not None:
        mask &= distance <= mixer.reach
    y = attend(q, k, v, mask, mixer.scale, mixer.soft_cap).reshape(len(x), -1)

    # The canonical cache: the latest tokens of the last document, each in the slot of its position.
    latest = np.flatnonzero(document == document[-1])[-slots:]
    keys, values = np.zeros((2, slots, mixer.kv_heads, mixer.head_dim))
    keys[position[latest] % slots] = k[latest]
    values[position[latest] % slots] = v[latest]
    num_tokens = np.count_nonzero(document[kept:] == document[-1])
    if document[-1] == 0:  # no document has started in this chunk
        num_tokens += seen
    new_state = {"keys": keys, "values": values, "num_tokens": np.array(num_tokens, np.int32)}
    return linear(subtree(params, "proj_final"), y), new_state


def mlp_block(params: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """ffw_down(gelu(x @ w[0] + b[0]) * (x @ w[1] + b[1])), with w and any b from ffw_up."""
    x, w = _f64(x), _f64(params["ffw_up.w"])
    b = _f64(params.get("ffw_up.b", np.zeros((2, 1, 1, 1))))
    gate, up = (x @ w[half] + b[half, 0, 0] for half in (0, 1))
    return linear(subtree(params, "ffw_down"), gelu_tanh(gate) * up)


# What computes each mixer, by its class; a new mixer adds itself here.
MIXERS: dict[type, Callable[..., tuple[Row, dict[str, Array]]]] = {
    Recurrent: recurrent_block,
    Attention: attention_block,
}


def residual_block(
    layer: Layer, params: Params, x: Row, positions: Positions, state: BlockState
) -> tuple[Row, dict[str, Array]]:
    """x + mixer(norm(x)), then that plus mlp_block of its own norm; with post norms around both."""

    def post(name: str, y: Row) -> Row:
        return rms_norm(y, params[f"{name}_post_norm.scale"]) if layer.post_norms else y

    mixer = layer.mixer
    normed = rms_norm(x, params["temporal_pre_norm.scale"])
    mixer_params = subtree(params, block_name(mixer))
    mixed, new_state = MIXERS[type(mixer)](mixer, mixer_params, normed, positions, state)
    x = x + post("temporal", mixed)
    normed = rms_norm(x, params["channel_pre_norm.scale"])
    return x + post("channel", mlp_block(subtree(params, "mlp_block"), normed)), new_state


def embed(
    config: Config, input_embedding: Float[Array, "v d"], tokens: Int[Array, "*b"]
) -> Float[Array, "*b d"]:
    """The tokens' rows of the table, times the config's scale."""
    return _f64(input_embedding)[tokens] * config.model.embedding_scale


def soft_cap(x: Array, cap: float) -> Array:
    """tanh(x / cap) * cap; x itself where the cap is 0."""
    return np.tanh(_f64(x) / cap) * cap if cap else _f64(x)


def decode(
    config: Config, input_embedding: Float[Array, "v d"], x: Float[Array, "*b d"]
) -> Float[Array, "*b v"]:
    """Logits: soft_cap(x @ input_embedding^T)."""
    return soft_cap(_f64(x) @ _f64(input_embedding).T, config.model.soft_cap)


def model_row(
    config: Config,
    params: Params,
    tokens: Int[Array, "t"],
    positions: Positions,
    state: Mapping[str, BlockState],
) -> tuple[Float[Array, "t v"], State]:
    """decode(norm(blocks(embed(tokens)))) for one row without padding."""
    x = embed(config, params["embedder.input_embedding"], tokens)
    new_state: State = {}
    for i, layer in enumerate(config.model.layers):
        name = f"blocks.{i}"
        block_params = subtree(params, name)
        x, new_state[name] = residual_block(layer, block_params, x, positions, state[name])
    x = rms_norm(x, params["final_norm.scale"])
    return decode(config, params["embedder.input_embedding"], x), new_state


def forward(
    config: Config,
    params: Params,
    tokens: Array,
    segment_pos: Array,
    state: Mapping[str, BlockState] | None = None,
) -> tuple[Float[Array, "b t v"], State]:
    """The whole model: logits for each token's successor, and the state after the last token.

    Args:
      config: The model.
      params: Every parameter of the layer spec, in any float dtype.
      tokens: Token ids [B, T]. What stands at padding is ignored.
      segment_pos: Position of each token in its document [B, T]; -1 is padding, which comes first
        in a row. A row may continue the document of the state (its first position is then not 0),
        may be all padding, and may be empty.
      state: What `forward` returned for the tokens before these; `None` if there were none.

    Returns:
      Logits, zeros at padding, and the canonical state (see above). Nothing passed in is changed.

    Raises:
      ValueError: Parameters, tokens or positions do not fit the config or each other.
    """
    require_match(
        {spec.path: spec.shape for spec in layer_spec(config)},
        {path: np.shape(value) for path, value in params.items()},
    )
    validate_positions(segment_pos)
    if tokens.shape != segment_pos.shape:
        raise UserError(
            "tokens and segment_pos must have the same shape, "
            f"got {tokens.shape} and {segment_pos.shape}"
        )
    real = tokens[segment_pos >= 0]
    if np.any((real < 0) | (real >= config.vocab_size)):
        raise UserError(
            f"tokens must be in 0 ... {config.vocab_size - 1}, got {real.min()} ... {real.max()}"
        )
    if state is None:
        state = init_state(config, len(tokens))
    params = {path: _f64(value) for path, value in params.items()}
    state = _tree_map(lambda leaf: leaf if leaf.dtype.kind == "i" else _f64(leaf), state)
    return over_rows(functools.partial(model_row, config, params), tokens, segment_pos, state)


def over_rows(
    row_function: Callable[[Array, Array, Any], tuple[Array, Any]],
    x: Array,
    segment_pos: Int[Array, "b t"],
    state: Any,
) -> tuple[Array, Any]:
    """row_function(x, positions, state) on every row without its padding, then zeros put back.

    x is [B, T, ...]; the state is an array, or a mapping (of mappings) of arrays, [B, ...]. To test
    a batched recurrent block, say: `over_rows(partial(recurrent_block, config, params), ...)`.
    """
    outputs, states = [], []
    for b, start in enumerate(np.count_nonzero(segment_pos < 0, axis=1)):
        state_row = _tree_map(lambda leaf, b=b: np.asarray(leaf[b]), state)
        y, new_state = row_function(x[b, start:], segment_pos[b, start:], state_row)
        outputs.append(np.concatenate([np.zeros((start, *y.shape[1:])), y]))
        states.append(new_state)
    return np.stack(outputs), _tree_map(lambda *rows: np.stack(rows), *states)


def init_state(config: Config, batch_size: int, capacity: int | None = None) -> State:
    """The state of rows that have seen nothing: zeros."""

    def zeros(shape: tuple[int, ...], dtype: str) -> Array:
        return np.zeros(shape, np.int32 if dtype == "int32" else np.float64)

    cache = init_cache(config, batch_size, zeros, capacity)
    return {name: block._asdict() for name, block in cache.items()}


def validate_positions(segment_pos: Array) -> None:
    """Raises `ValueError` unless these are the positions of a batch of chunks.

    In each row: -1 (padding) only before the tokens; then any position from 0 on; then at each
    step the next position, or 0 where a document starts.
    """
    if segment_pos.ndim != 2 or not len(segment_pos) or segment_pos.dtype.kind not in "iu":
        raise UserError(
            "segment_pos must be integers of shape [batch, time] with at least one row, "
            f"got {segment_pos.dtype} of shape {segment_pos.shape}"
        )
    before = np.full_like(segment_pos, -1, np.int64)
    before[:, 1:] = segment_pos[:, :-1]
    follows = np.where(before < 0, segment_pos >= -1, segment_pos == before + 1)
    bad = np.argwhere(~(follows | (segment_pos == 0)))
    if len(bad):
        row, t = bad[0]
        got, last = segment_pos[row, t], before[row, t]
        expected = "-1 (padding) or a position" if last < 0 else f"{last + 1} or 0"
        raise UserError(
            "segment_pos must be padding (-1), then consecutive positions, 0 starting a document: "
            f"expected {expected} after {last}, got {got} at row {row}, step {t}"
        )


def subtree(params: Params, prefix: str) -> Params:
    """The parameters below a prefix, by their paths from there."""
    prefix += "."
    return {path[len(prefix) :]: v for path, v in params.items() if path.startswith(prefix)}


def _tree_map(function: Callable[..., Any], *trees: Any) -> Any:
    """`function` of the corresponding arrays of mappings that are structured alike."""
    if not isinstance(trees[0], Mapping):
        return function(*trees)
    return {key: _tree_map(function, *(tree[key] for tree in trees)) for key in trees[0]}
