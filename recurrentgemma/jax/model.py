"""The model of any config: Griffin (arXiv 2402.19427), RecurrentGemma (2404.07839), Gemma."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.inputs import check_inputs
from recurrentgemma.common.model.layer_spec import num_parameters
from recurrentgemma.common.model.state import check_state
from recurrentgemma.jax.blocks import Block
from recurrentgemma.jax.cache import Cache, init_cache, require_capacity
from recurrentgemma.jax.layers import Embedder, RMSNorm
from recurrentgemma.jax.runtime.axes import AnyAxes
from recurrentgemma.jax.runtime.blocks import run_blocks
from recurrentgemma.jax.runtime.promotion import default_promotion
from recurrentgemma.jax.runtime.trees import require_available
from recurrentgemma.jax.sharding import (
    ShardingSpec,
    constrained,
    scan_split,
    state_shardings,
    token_split,
)


class Model(AnyAxes):
    """Embedder, residual blocks, final norm, tied output.

    Attributes:
      config: What the model is.
      gradient_checkpointing: Whether each block's activations are recomputed in the backward pass.
        They are not where activations are captured or methods of modules are intercepted.
      dtype: Of the computation; that of the parameters if None.
      param_dtype: Of the parameters that `init` makes.
      scan_sharding_spec: How the linear recurrence is split over devices, if it is; on a mesh None
        splits it like the activations.
      mesh: The devices that weights and activations are split over, if they are; see `make_mesh`.
      scan_layers: Whether layers that repeat run in a loop where no state is given: compile time
        does not grow with depth, but their weights are copied. None: in training on a mesh.
    """

    config: Config
    gradient_checkpointing: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scan_sharding_spec: ShardingSpec | None = None
    mesh: Mesh | None = None
    scan_layers: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.gradient_checkpointing, bool):
            raise UserError(
                f"gradient_checkpointing must be a bool, got {self.gradient_checkpointing!r}; "
                "a ShardingSpec is given by name, as scan_sharding_spec"
            )
        super().__post_init__()

    def setup(self) -> None:
        for dtype in (self.dtype, self.param_dtype):
            require_available(dtype)
        value = self.config.model
        sizes = (value.vocab_size, value.width, value.embedding_scale, value.soft_cap)
        self.embedder = Embedder(*sizes, **self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        split = {"scan_sharding_spec": self.scan_sharding_spec, "mesh": self.mesh}
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return {**dtypes, "scan_type": self.config.scan_type, **split}

    def __repr__(self) -> str:
        return f"Model({self.config!r}, {num_parameters(self.config):,} parameters)"

    def __call__(
        self,
        tokens: Integer[Array, "b t"] | np.ndarray,
        segment_pos: Integer[Array, "b t"] | np.ndarray,
        cache: Cache | None = None,
        return_logits: bool = True,
        return_cache: bool = True,
        last_logits_only: bool = False,
    ) -> tuple[Float[Array, "b _ v"] | None, Cache | None]:
        """Logits of the next token at every place, and the state after the last.

        Args:
          tokens: Token ids, [B, T].
          segment_pos: Position of each token in its document, [B, T]: 0 starts a document, and -1
            is padding, which may only come before a row's tokens. Values are checked where the
            arrays are NumPy's; see `check`.
          cache: State to continue from, from an earlier call or `init_cache`. It is not changed.
          return_logits: Whether to compute logits.
          return_cache: Whether to return the state.
          last_logits_only: Whether to compute logits of the last place alone, [B, 1, V].

        Returns:
          Logits in float32 (float64 beside float64), [B, T, V], unspecified at padding, and the
          state. What was not asked for is None.

        Raises:
          ValueError: `tokens` and `segment_pos` are not two [B, T] arrays of integers of one shape,
            or `cache` is not the state of B rows of this model, or JAX has the dtype turned off.
        """
        x, new_cache = self.hidden(tokens, segment_pos, cache, last_logits_only)
        logits = self.embedder.decode(x) if return_logits else None
        return logits, new_cache if return_cache else None

    @nn.compact
    @default_promotion
    def hidden(
        self,
        tokens: Integer[Array, "b t"] | np.ndarray,
        segment_pos: Integer[Array, "b t"] | np.ndarray,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> tuple[Float[Array, "b _ d"], Cache]:
        """The final hidden states, which `decode` turns into logits, and the state after the last.

        Arguments and errors are those of `__call__`; `last_only` gives the last place, [B, 1, D].
        """
        tokens, segment_pos = (
            z if isinstance(z, Array) else np.asarray(z) for z in (tokens, segment_pos)
        )
        check_inputs(tokens, segment_pos, self.config.model.vocab_size)
        tokens, segment_pos = jnp.asarray(tokens), jnp.asarray(segment_pos)
        if cache is not None:
            require_capacity(check_state(self.config, cache, tokens.shape[0]), segment_pos)
        value, settings = self.config.model, self._settings
        rows, length = tokens.shape
        split = token_split(self.mesh, rows, length if cache is None else 1)
        if self.mesh is not None and self.scan_sharding_spec is None:
            settings["scan_sharding_spec"] = scan_split(self.mesh, split)
        x = constrained(self.embedder.encode(tokens), self.mesh, split)
        if not x.size:  # nothing happens to the state
            new_cache: Cache = cache or self.init_cache(rows, x.dtype)
        else:
            variance = {"final_w_init_variance_scale": 2 / max(value.num_layers, 1)}
            make = functools.partial(Block, value.width, **variance, **settings)
            x, new_cache = run_blocks(self, make, split, x, segment_pos, cache)
            if self.mesh is not None:
                places = state_shardings(self.config, self.mesh, x.shape[0])
                new_cache = jax.tree.map(jax.lax.with_sharding_constraint, new_cache, places)
        if last_only:
            x = x[:, -1:]
        return RMSNorm(value.width, **settings, name="final_norm")(x), new_cache

    def check(self, tokens: Any, segment_pos: Any) -> None:
        """Checks the values of the inputs. The model itself checks only NumPy arrays.

        Raises:
          ValueError: A token is outside the vocabulary, or padding comes behind a token.
        """
        tokens, segment_pos = np.asarray(tokens), np.asarray(segment_pos)
        check_inputs(tokens, segment_pos, self.config.model.vocab_size)

    def init_cache(
        self, batch_size: int, dtype: Dtype | None = None, capacity: int | None = None
    ) -> Cache:
        """The state before the first token.

        Args:
          batch_size: Number of rows, B.
          dtype: Of keys, values and convolution inputs; the computation's if None. The RG-LRU's
            state is float32 or wider.
          capacity: Tokens that a state which grows with the text has room for; 256 if None.
        """
        dtype = dtype or self.dtype or self.param_dtype
        return init_cache(self.config, batch_size, dtype, capacity)
