"""The model of any config: Griffin (arXiv 2402.19427), RecurrentGemma (2404.07839), Gemma."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Integer

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.inputs import check_inputs
from recurrentgemma.common.model.layer_spec import num_parameters, sample_params
from recurrentgemma.common.model.state import check_state
from recurrentgemma.jax.blocks import Block
from recurrentgemma.jax.cache import Cache, init_cache, require_capacity
from recurrentgemma.jax.layers import Embedder, RMSNorm
from recurrentgemma.jax.runtime.axes import automatic, partition
from recurrentgemma.jax.runtime.promotion import default_promotion
from recurrentgemma.jax.runtime.trees import Params, get_path, require_available, set_path
from recurrentgemma.jax.sharding import (
    ShardingSpec,
    TokenSplit,
    constrained,
    gathering,
    is_split,
    put,
    scan_split,
    shardings,
    state_shardings,
    token_split,
)


class Model(nn.Module):
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
    """

    config: Config
    gradient_checkpointing: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scan_sharding_spec: ShardingSpec | None = None
    mesh: Mesh | None = None

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

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Linen's `apply`; outputs are split over explicit axes as the rows of tokens are.

        Raises:
          ValueError: `variables` has no "params".
        """
        if "params" not in variables:
            raise UserError(f'variables must be {{"params": params}}, got {", ".join(variables)}')
        return _on_any_axes(super().apply, variables, *args, **kwargs)

    @nn.nowrap
    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Linen's `init_with_output`; see `apply`."""
        return _on_any_axes(super().init_with_output, rngs, *args, **kwargs)

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
        check_inputs(tokens, segment_pos, self.config.model.vocab_size)
        tokens = jnp.asarray(tokens)
        segment_pos = jnp.asarray(segment_pos)
        if not all(jnp.issubdtype(z.dtype, jnp.integer) for z in (tokens, segment_pos)):
            raise UserError(
                "tokens and segment_pos must be integers, "
                f"got {tokens.dtype} and {segment_pos.dtype}"
            )
        if tokens.ndim != 2 or tokens.shape != segment_pos.shape:
            raise UserError(
                "tokens and segment_pos must have one shape [B, T], "
                f"got {tokens.shape} and {segment_pos.shape}"
            )
        if cache is not None:
            arrays = {name: block._asdict() for name, block in cache.items()}
            require_capacity(check_state(self.config, arrays, tokens.shape[0]), segment_pos)
        value, settings = self.config.model, self._settings
        rows, length = tokens.shape
        split: TokenSplit = ((), ())
        if self.mesh is not None:
            split = token_split(self.mesh, rows, length if cache is None else 1)
            if self.scan_sharding_spec is None:
                settings["scan_sharding_spec"] = scan_split(self.mesh, split)
        x = constrained(self.embedder.encode(tokens), self.mesh, split)
        variance = 2 / max(value.num_layers, 1)
        new_cache: Cache = {}
        if not x.size:  # nothing happens to the state
            new_cache = cache or self.init_cache(tokens.shape[0], x.dtype)
        else:
            stored = None if _watched(self) else self.variables["params"]
            for i, layer in enumerate(value.layers):
                name = f"blocks.{i}"
                inputs = x, segment_pos, cache[name] if cache else None
                sizes = value.width, layer, variance
                if stored is None:
                    x, new_cache[name] = Block(*sizes, **settings, name=name)(*inputs)
                else:
                    block = Block(*sizes, **settings, parent=None)
                    remat = self.gradient_checkpointing
                    x, new_cache[name] = _block(block, remat, stored[name], *inputs)
                x = constrained(x, self.mesh, split)
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


def _watched(module: nn.Module) -> bool:
    """Whether Linen must see the calls of the modules inside: it makes, keeps or changes values."""
    intercepted = bool(nn.module._global_interceptor_stack)  # Linen has no public name for it
    captured = module.is_mutable_collection("intermediates")
    return module.is_initializing() or captured or intercepted


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block(block: Block, remat: bool, params: Params, *inputs: Any) -> tuple[Array, Any]:
    """A block's outputs. Blocks that differ in their parameters' values alone are traced once."""

    def call(params: Params, *inputs: Any) -> Any:
        variables: Any = {"params": params}
        if block.mesh is not None:
            variables = gathering(block.mesh, block.width, block.layer)(variables)
        return block.apply(variables, *inputs)

    return (jax.checkpoint(call) if remat else call)(params, *inputs)


def _on_any_axes(function: Any, first: Any, *args: Any, **kwargs: Any) -> Any:
    """A method of Linen on automatic axes, its results split as the tokens are."""
    tokens: Any = args[0] if args else kwargs.get("tokens")

    def split(result: Array) -> PartitionSpec:
        shape = np.shape(tokens)
        shared = 2 if result.ndim > 2 and result.shape[:2] == shape else 1
        if not shape or result.shape[:shared] != shape[:shared]:
            return PartitionSpec()
        return PartitionSpec(*partition(tokens)[:shared])

    return automatic(function, lambda results: jax.tree.map(split, results), first, *args, **kwargs)


def init_params(
    config: Config, seed: int, dtype: Dtype = jnp.float32, *, mesh: Mesh | None = None
) -> Params:
    """Initial parameters as the layer spec draws them: the PyTorch twin's, bit for bit.

    Args:
      config: The model.
      seed: The seed.
      dtype: The dtype of the parameters.
      mesh: The devices that they are split over; the first device if None.

    Raises:
      ValueError: JAX has the dtype turned off, or the mesh does not fit the model.
    """
    require_available(dtype)
    places = None if mesh is None else shardings(config, mesh)
    params: dict[str, Any] = {}
    for spec, value in sample_params(config, seed):
        on_device = put(value, places[spec.path], dtype) if places else jnp.asarray(value, dtype)
        set_path(params, spec.path, on_device)
    return params


def laid_out(model: Model, params: Params) -> Params:
    """The parameters without a `params` level; on the model's mesh, if it has one."""
    params = params.get("params", params)
    if model.mesh is None or is_split(get_path(params, "embedder.input_embedding")):
        return params
    result: dict[str, Any] = {}
    for path, place in shardings(model.config, model.mesh).items():
        set_path(result, path, put(get_path(params, path), place))
    return result
