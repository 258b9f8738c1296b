"""The layers under the blocks. Shapes and initial values come from the layer spec."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Integer

from recurrentgemma.common.model.config import GriffinConfig
from recurrentgemma.common.model.layer_spec import (
    CONV1D_WIDTH,
    Init,
    Normal,
    RingLog,
    Zeros,
    spec_by_path,
)
from recurrentgemma.jax.cache import num_padding, prepend_history
from recurrentgemma.jax.scan import as_positions, wide_dtype
from recurrentgemma.jax.sharding import ShardingSpec

MANY_STEPS = 64


def initializer(init: Init):
    """A Flax initialiser that draws as the layer spec says, in float32 or wider, then casts."""

    def draw(key, shape, dtype=jnp.float32):
        wide = wide_dtype(dtype)
        match init:
            case Normal(std):
                values = std * jax.random.normal(key, shape, wide)
            case RingLog():
                values = init.from_uniform(jax.random.uniform(key, shape, wide), jnp)
            case Zeros():
                values = jnp.zeros(shape, wide)
        return values.astype(dtype)

    return draw


def gelu(x: Array) -> Array:
    """x * Phi(x) in its tanh form, computed in float32."""
    return jax.nn.gelu(x.astype(wide_dtype(x.dtype)), approximate=True).astype(x.dtype)


class SpecModule(nn.Module):
    """A module whose parameters are declared in the layer spec under `prefix`.

    Attributes:
      config: What the model is.
      prefix: Path of the module in the model.
      dtype: Of the computation; that of parameters and inputs if None.
      param_dtype: Of the parameters.
      scan_sharding_spec: How the linear recurrence is split over devices, if it is.
    """

    config: GriffinConfig
    prefix: str = ""
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scan_sharding_spec: ShardingSpec | None = None

    def parameter(self, name: str) -> Array:
        """A parameter of the shape that the layer spec gives."""
        spec = spec_by_path(self.config)[f"{self.prefix}.{name}"]
        return self.param(name, initializer(spec.init), spec.shape, self.param_dtype)

    def linear(self, name: str) -> nn.Dense:
        """A linear layer of the shape that the layer spec gives."""
        specs = spec_by_path(self.config)
        kernel = specs[f"{self.prefix}.{name}.kernel"]
        return nn.Dense(
            kernel.shape[1],
            use_bias=f"{self.prefix}.{name}.bias" in specs,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initializer(kernel.init),
            name=name,
        )

    def child(self, kind: type[SpecModule], name: str) -> SpecModule:
        """A module under this one, with its config and dtypes."""
        prefix = f"{self.prefix}.{name}" if self.prefix else name
        return kind(
            self.config,
            prefix,
            self.dtype,
            self.param_dtype,
            self.scan_sharding_spec,
            name=name,
        )


class RMSNorm(SpecModule):
    """y = x / sqrt(mean(x^2) + 1e-6) * (1 + scale), computed in float32."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        (x,) = promote_dtype(x, dtype=self.dtype)
        x32 = x.astype(wide_dtype(x.dtype))
        rms = jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + 1e-6)
        return (x32 * rms * (1 + self.parameter("scale").astype(x32.dtype))).astype(x.dtype)


class BlockDiagonalLinear(SpecModule):
    """y_h = x_h W_h + b_h over heads h of the last axis."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t l"]) -> Float[Array, "b t l"]:
        x, w, b = promote_dtype(x, self.parameter("w"), self.parameter("b"), dtype=self.dtype)
        x_bthi = x.reshape(*x.shape[:2], *w.shape[:2])
        y_bthj = jnp.einsum("bthi,hij->bthj", x_bthi, w) + b
        return y_bthj.reshape(x.shape)


class Conv1D(SpecModule):
    """y_t = b + sum_k w_{3-k} * x_{t-k}: depthwise, causal, within a document.

    The products are summed in float32.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t l"],
        segment_pos: Int[Array, "b t"],
        state: Float[Array, "b 3 l"] | None = None,
    ) -> tuple[Float[Array, "b t l"], Float[Array, "b 3 l"]]:
        """Returns the outputs and the state after them (see `RecurrentBlockCache`)."""
        (x,) = promote_dtype(x, dtype=self.dtype)
        segment_pos = as_positions(segment_pos, x)
        length, reach = x.shape[1], CONV1D_WIDTH - 1
        if state is not None and length == 1:
            return self._step(x, segment_pos, state)
        if state is None:
            tokens_alone = jnp.where((segment_pos >= 0)[..., None], x, 0)
            extended = jnp.pad(tokens_alone, ((0, 0), (reach, 0), (0, 0)))
        else:
            extended = prepend_history(state, x, num_padding(segment_pos))
        wide = wide_dtype(x.dtype)
        w, b = self.parameter("w").astype(wide), self.parameter("b").astype(wide)
        y = x * w[reach] + b
        for k in range(1, CONV1D_WIDTH):
            # The token at position p of its document has p tokens before it.
            earlier = extended[:, reach - k : reach - k + length]
            y = y + jnp.where((segment_pos >= k)[..., None], earlier, 0) * w[reach - k]
        return y.astype(x.dtype), self._new_state(extended, segment_pos, state is not None)

    def _step(self, x: Array, segment_pos: Array, state: Array) -> tuple[Array, Array]:
        """One token a row."""
        wide = wide_dtype(x.dtype)
        w, b = self.parameter("w").astype(wide), self.parameter("b").astype(wide)
        # Zeros stand for what a document has not had yet; another's are forgotten at its start.
        state = jnp.where((segment_pos == 0)[..., None], 0, state.astype(x.dtype))
        extended = jnp.concatenate([state, x], 1)
        y = (extended * w).sum(1, keepdims=True) + b
        return y.astype(x.dtype), jnp.where((segment_pos < 0)[..., None], state, extended[:, 1:])

    def _new_state(self, extended: Array, segment_pos: Array, continues: bool) -> Array:
        reach = CONV1D_WIDTH - 1
        if not segment_pos.shape[1]:
            return extended
        last_pos = segment_pos[:, -1:]
        if continues:  # a row of padding only keeps what it had
            last_pos = jnp.where(last_pos < 0, reach, last_pos)
        age = jnp.arange(reach - 1, -1, -1)
        return jnp.where((age <= last_pos)[..., None], extended[:, -reach:], 0)


class Einsum(SpecModule):
    """y_c = x W_c + b_c for each of the C matrices of the weight."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t m"], ...]:
        x, w, b = promote_dtype(x, self.parameter("w"), self.parameter("b"), dtype=self.dtype)
        x_zd = x.reshape(-1, x.shape[-1])
        # Of few steps one batched product, since separate ones take copies of the matrices; of
        # many separate products, which are faster. As jnp.einsum both would copy the weight.
        if x.shape[1] < MANY_STEPS:
            y_czm = jnp.matmul(jnp.broadcast_to(x_zd, (len(w), *x_zd.shape)), w)
        else:
            y_czm = [x_zd @ w_dm for w_dm in w]
        return tuple(
            y_zm.reshape(*x.shape[:2], w.shape[-1]) + b_11m
            for y_zm, b_11m in zip(y_czm, b, strict=True)
        )


class Embedder(SpecModule):
    """Token embeddings, tied between input and output."""

    def setup(self) -> None:
        self.input_embedding = self.parameter("input_embedding")

    def encode(self, tokens: Integer[Array, "b t"]) -> Float[Array, "b t d"]:
        """The embeddings, times sqrt(D) rounded to bfloat16 where the config says so."""
        (x,) = promote_dtype(self.input_embedding[tokens], dtype=self.dtype)
        return x * self.config.embedding_scale

    def decode(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Logits, soft-capped, in float32 (float64 beside float64)."""
        x, w = promote_dtype(x, self.input_embedding, dtype=self.dtype)
        # Of matrices, since XLA transposes all logits for the gradient of an einsum over b and t.
        x_zd, wide = x.reshape(-1, x.shape[-1]), wide_dtype(x.dtype)
        logits = jnp.matmul(x_zd, w.T, preferred_element_type=wide)
        logits = logits.reshape(*x.shape[:2], len(w))
        cap = self.config.logits_soft_cap
        return jnp.tanh(logits / cap) * cap if cap else logits
