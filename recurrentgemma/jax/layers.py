"""The layers under the blocks, each built from its sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer, Shaped

from recurrentgemma.common.model import params
from recurrentgemma.common.model.numerics import RMS_EPS
from recurrentgemma.common.model.params import ParamSpec
from recurrentgemma.common.model.presets import ScanType
from recurrentgemma.common.published import JAX_LAYERS, elsewhere
from recurrentgemma.jax import scan as scan  # published code reads layers.scan
from recurrentgemma.jax.cache import Hidden, Positions, num_padding, prepend_history
from recurrentgemma.jax.products import STORED, Adapted, dense, lookup, product, promote_dtype
from recurrentgemma.jax.runtime.promotion import default_promotion
from recurrentgemma.jax.runtime.sequence import lagged, slices
from recurrentgemma.jax.runtime.trees import initializer
from recurrentgemma.jax.runtime.vocabulary import lookup as split_lookup
from recurrentgemma.jax.scan import as_positions, wide_dtype
from recurrentgemma.jax.sharding import ShardingSpec, splits_steps

MATRICES = "...td,cdD->c...tD"  # x W_c for each matrix of a stack
_METHODS = {"__call__", "encode", "decode"}
_SETTINGS = ("dtype", "param_dtype", "scan_type", "scan_sharding_spec", "mesh")
_M = TypeVar("_M", bound="SpecModule")


def gelu(x: Array) -> Array:
    """x * Phi(x) in its tanh form, computed in float32."""
    return jax.nn.gelu(x.astype(wide_dtype(x.dtype)), approximate=True).astype(x.dtype)


class SpecModule(nn.Module, kw_only=True):
    """A module that declares its own parameters, and hands its settings to those inside.

    Attributes:
      dtype: Of the computation; that of parameters and inputs if None.
      param_dtype: Of the parameters.
      scan_type: Which implementation computes a linear recurrence.
      scan_sharding_spec: How the linear recurrence is split over devices, if it is.
      mesh: The devices that weights and activations are split over, if they are.
    """

    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scan_type: ScanType = ScanType.AUTO
    scan_sharding_spec: ShardingSpec | None = None
    mesh: Mesh | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        for name in _METHODS & vars(cls).keys():
            setattr(cls, name, default_promotion(vars(cls)[name]))
        super().__init_subclass__(**kwargs)

    @property
    def settings(self) -> dict[str, Any]:
        """The five attributes, for a module inside."""
        return {name: getattr(self, name) for name in _SETTINGS}

    def declare(self, specs: Iterable[ParamSpec]) -> list[Any]:
        """The module's own parameters, in the order of their specs, as they are stored."""
        found = []
        for spec in specs:
            stored = self.get_variable("params", spec.path)
            if not isinstance(stored, STORED):
                draw = initializer(spec.init)
                stored = self.param(spec.path, draw, spec.shape, self.param_dtype)
            found.append(stored)
        return found

    def linear(
        self, name: str, width: int, width_out: int, bias: bool = True, variance: float = 1.0
    ) -> Linear:
        """A linear layer."""
        return self.child(Linear, name, width, width_out, bias, variance)

    def child(self, kind: type[_M], name: str, *sizes: Any, **options: Any) -> _M:
        """A module inside this one, with its settings."""
        return kind(*sizes, **self.settings, **options, name=name)


class Linear(SpecModule):
    """y = x W + b."""

    width: int
    width_out: int
    bias: bool = True
    variance: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b j"]:
        sizes = (self.width, self.width_out)
        parameters = self.declare(params.linear(sizes, variance=self.variance, bias=self.bias))
        return product(*promote_dtype(x, *parameters, dtype=self.dtype))


class RMSNorm(SpecModule):
    """y = x / sqrt(mean(x^2) + eps) * (1 + scale), computed in float32."""

    width: int
    eps: float = RMS_EPS

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        (scale,) = self.declare(params.rms_norm(self.width))
        (x,) = promote_dtype(x, dtype=self.dtype)
        x32 = x.astype(wide_dtype(x.dtype))
        rms = jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return (x32 * rms * (1 + scale.astype(x32.dtype))).astype(x.dtype)


class BlockDiagonalLinear(SpecModule):
    """y_h = x_h W_h + b_h over blocks h of the last axis."""

    width_input: int
    num_blocks: int
    width_output: int | None = None
    w_init_variance_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*b l"]) -> Float[Array, "*b m"]:
        sizes = (self.width_input, self.num_blocks, self.width_output, self.w_init_variance_scale)
        w, b = self.declare(params.block_diagonal(*sizes))
        x, w, b = promote_dtype(x, w, b, dtype=self.dtype)

        def blocks(x: Array) -> Array:
            x_hzi = x.reshape(-1, *w.shape[:2]).swapaxes(0, 1)
            y_hzj = product(x_hzi, w, b[:, None])
            return y_hzj.swapaxes(0, 1).reshape(*x.shape[:-1], w.shape[0] * w.shape[2])

        # Rows and steps stay apart where a mesh splits both.
        return jax.vmap(blocks)(x) if splits_steps(self.mesh) else blocks(x)


class Conv1D(SpecModule):
    """y_t = b + sum_k w_{taps-1-k} x_{t-k}, depthwise and causal in a document, in float32."""

    width: int
    temporal_width: int
    w_init_variance_scale: float = 0.01

    @nn.compact
    def __call__(
        self, x: Hidden, segment_pos: Positions, cache: Any = None, return_cache: bool = True
    ) -> tuple[Hidden, Any]:
        """Returns the outputs and the state after them (see `RecurrentBlockCache`)."""
        (x,) = promote_dtype(x, dtype=self.dtype)
        segment_pos = as_positions(segment_pos, x)
        length, reach = x.shape[1], self.temporal_width - 1
        specs = params.conv_1d(self.width, self.temporal_width, self.w_init_variance_scale)
        wide = wide_dtype(x.dtype)
        w, b = (parameter.astype(wide) for parameter in self.declare(specs))
        if cache is not None and length == 1:
            y, new_cache = _step(x, segment_pos, cache, w, b)
            return y, new_cache if return_cache else None
        if cache is None:
            tokens_alone = jnp.where((segment_pos >= 0)[..., None], x, 0)
            extended = jnp.pad(tokens_alone, ((0, 0), (reach, 0), (0, 0)))
            earlier = lagged(tokens_alone, reach, self.mesh)
        else:
            extended = prepend_history(cache, x, num_padding(segment_pos))
            earlier = slices(extended, reach)
        y = x * w[reach] + b
        for k in range(1, reach + 1):
            # The token at position p of its document has p tokens before it.
            y = y + jnp.where((segment_pos >= k)[..., None], earlier[k - 1], 0) * w[reach - k]
        new_cache = _new_state(extended, segment_pos, reach, cache is not None)
        return y.astype(x.dtype), new_cache if return_cache else None


def _step(x: Array, segment_pos: Array, state: Array, w: Array, b: Array) -> tuple[Array, Array]:
    """One token a row."""
    # Zeros stand for inputs that the document lacks; its start forgets another document's.
    state, reach = jnp.where((segment_pos == 0)[..., None], 0, state.astype(x.dtype)), len(w) - 1
    # No sum over an axis, which XLA hands to a library: for so few values that takes longer.
    y = x * w[reach] + b + sum(state[:, k : k + 1] * w[k] for k in range(reach))
    new_state = jnp.concatenate([state[:, 1:], x], 1)
    return y.astype(x.dtype), jnp.where((segment_pos < 0)[..., None], state, new_state)


def _new_state(extended: Array, segment_pos: Array, reach: int, continues: bool) -> Array:
    if not segment_pos.shape[1]:
        return extended
    last_pos = segment_pos[:, -1:]
    if continues:  # a row of padding only keeps what it had
        last_pos = jnp.where(last_pos < 0, reach, last_pos)
    age = jnp.arange(reach - 1, -1, -1)
    return jnp.where((age <= last_pos)[..., None], extended[:, extended.shape[1] - reach :], 0)


class Einsum(SpecModule):
    """y = einsum(eqn, x, w) + b."""

    w_shape: Sequence[int]
    b_shape: Sequence[int] | None
    eqn: str
    w_init_variance_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        specs = params.einsum(self.w_shape, self.b_shape, self.w_init_variance_scale)
        w, *bias = self.declare(specs)
        x, w, *bias = promote_dtype(x, w, *bias, dtype=self.dtype)
        if self.eqn != MATRICES or splits_steps(self.mesh):  # rows and steps stay apart
            base, *pair = w if isinstance(w, Adapted) else (w,)
            y = jnp.einsum(self.eqn, x, dense(base))
            if pair:
                y += jnp.einsum("c...tr,crD->c...tD", jnp.einsum(self.eqn, x, pair[0]), pair[1])
            return y + bias[0] if bias else y
        b = bias[0].reshape(w.shape[0], 1, -1) if bias else None
        y_czm = product(x.reshape(1, -1, x.shape[-1]), w, b)
        return y_czm.reshape(w.shape[0], *x.shape[:-1], w.shape[-1])


class Embedder(SpecModule):
    """Token embeddings, tied between input and output."""

    vocab_size: int
    embed_dim: int
    scale: float = 1.0
    soft_cap: float = 0.0

    def setup(self) -> None:
        (self.input_embedding,) = self.declare(params.embedder(self.vocab_size, self.embed_dim))

    def encode(self, tokens: Integer[Array, "b t"]) -> Hidden:
        """The embeddings, times the scale in their dtype."""
        table = self.input_embedding
        if self.mesh is None or not isinstance(table, jax.Array):
            x = lookup(table, tokens)
        else:
            x = split_lookup(table, tokens, self.mesh)
        (x,) = promote_dtype(x, dtype=self.dtype)
        return x * self.scale

    def decode(self, x: Hidden) -> Float[Array, "b t v"]:
        """Logits, soft-capped, in float32 (float64 beside float64)."""
        x, w = promote_dtype(x, self.input_embedding, dtype=self.dtype)
        # A matrix: for the gradient of an einsum XLA transposes all logits.
        x_zd = x if splits_steps(self.mesh) else x.reshape(-1, x.shape[-1])
        wide = wide_dtype(x.dtype)
        logits = product(x_zd, w, axis=-1, dtype=wide)
        logits = logits.reshape(*x.shape[:2], w.shape[0])
        cap = self.soft_cap
        return jnp.tanh(logits / cap) * cap if cap else logits


__getattr__ = elsewhere(__name__, JAX_LAYERS)
