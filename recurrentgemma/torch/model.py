"""The model of any config: Griffin (arXiv 2402.19427), RecurrentGemma (2404.07839), Gemma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.inputs import check_inputs
from recurrentgemma.common.model.layer_spec import require_match
from recurrentgemma.common.model.params import shapes_of
from recurrentgemma.common.model.state import check_state
from recurrentgemma.torch.cache import Cache, init_cache, require_capacity
from recurrentgemma.torch.layers import Embedder, RMSNorm, SpecModule
from recurrentgemma.torch.runtime.arrays import as_index, to_array
from recurrentgemma.torch.runtime.known import read_once
from recurrentgemma.torch.runtime.recompute import RecomputedBlock, can_recompute
from recurrentgemma.torch.sharding import shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Model(SpecModule):
    """Embedder, residual blocks, final norm, tied output.

    Attributes:
      config: What the model is.
      gradient_checkpointing: Whether each block's activations are recomputed in the backward pass.
    """

    def __init__(
        self,
        config: Config,
        gradient_checkpointing: bool = True,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        """Builds the model with initial weights; torch's global generator gives the seed.

        The generator itself stays as it is.

        Args:
          config: What the model is.
          gradient_checkpointing: Recompute each block in the backward pass, for less memory.
          device: Where the parameters live; "meta" allocates and initialises nothing.
          dtype: Of the parameters and the computation; torch's default if None.
          mesh: The processes over which the parameters are split (see `make_mesh`), instead of a
            device. Each must give the generator the same seed.

        Raises:
          ValueError: The mesh does not fit the model, or comes with a device.
        """
        if device is not None and mesh is not None:
            raise UserError(f"give either a device or a mesh, got {device=} {mesh=}")
        super().__init__()
        self.config, self.gradient_checkpointing = config, gradient_checkpointing
        value, meta = config.model, {"device": "meta", "dtype": dtype}
        scale, cap, variance = value.embedding_scale, value.soft_cap, 2 / max(value.num_layers, 1)
        self.embedder = Embedder(value.vocab_size, value.width, scale, cap, **meta)
        self.blocks = nn.ModuleList(
            RecomputedBlock(value.width, layer, variance, scan_type=value.scan_type, **meta)
            for layer in value.layers
        )
        self.final_norm = RMSNorm(value.width, **meta)
        if mesh is not None:
            shard(self, mesh)
        with torch.random.fork_rng(devices=[]):
            self.materialise(device if mesh is None else mesh.device_type)

    def forward(
        self,
        tokens: Integer[Tensor, "b t"] | np.ndarray,
        segment_pos: Integer[Tensor, "b t"] | np.ndarray,
        cache: Cache | None = None,
        return_logits: bool = True,
        return_cache: bool = True,
        last_logits_only: bool = False,
    ) -> tuple[Float[Tensor, "b _ v"] | None, Cache | None]:
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
            or `cache` is not the state of B rows of this model.
        """
        x, new_cache = self.hidden(tokens, segment_pos, cache, last_logits_only)
        logits = self.embedder.decode(x) if return_logits else None
        return logits, new_cache if return_cache else None

    def hidden(
        self,
        tokens: Integer[Tensor, "b t"] | np.ndarray,
        segment_pos: Integer[Tensor, "b t"] | np.ndarray,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> tuple[Float[Tensor, "b _ d"], Cache]:
        """The final hidden states, which `decode` turns into logits, and the state after the last.

        Arguments and errors are those of `forward`; `last_only` gives the last place, [B, 1, D].
        """
        tokens, segment_pos = (
            z if isinstance(z, Tensor) else np.asarray(z) for z in (tokens, segment_pos)
        )
        check_inputs(tokens, segment_pos, self.config.model.vocab_size)
        device = self.embedder.input_embedding.device
        tokens, segment_pos = as_index(tokens, device), as_index(segment_pos, device)
        if cache is not None:
            require_capacity(check_state(self.config, cache, tokens.shape[0]), segment_pos)
        segment_pos = read_once(segment_pos)
        x = self.embedder.encode(tokens)
        new_cache: Cache = {}
        if not x.numel():  # nothing happens to the state
            new_cache = cache or self.init_cache(tokens.shape[0])
        else:
            recompute = self.gradient_checkpointing and can_recompute()
            for i, block in enumerate(self.blocks):
                name = f"blocks.{i}"
                block_cache = cache[name] if cache else None
                x, new_cache[name] = block(x, segment_pos, block_cache, recompute=recompute)
        if last_only:
            x = x[:, -1:]
        return self.final_norm(x), new_cache

    def check(self, tokens: Any, segment_pos: Any) -> None:
        """Checks the values of the inputs. The model itself checks only NumPy arrays.

        Raises:
          ValueError: A token is outside the vocabulary, or padding comes behind a token.
        """
        tokens, segment_pos = (
            to_array(z) if isinstance(z, Tensor) else np.asarray(z) for z in (tokens, segment_pos)
        )
        check_inputs(tokens, segment_pos, self.config.model.vocab_size)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ):
        """Loads parameters as any module does, naming every difference at once.

        Raises:
          ValueError: With `strict`, names or shapes are not the model's.
        """
        if strict:
            require_match(shapes_of(self.state_dict()), shapes_of(state_dict))
        return super().load_state_dict(state_dict, strict, assign)

    def init_cache(
        self, batch_size: int, dtype: torch.dtype | None = None, capacity: int | None = None
    ) -> Cache:
        """The state before the first token, on the model's device.

        Args:
          batch_size: Number of rows, B.
          dtype: Of keys, values and convolution inputs; the parameters' if None. The RG-LRU's state
            is float32 or wider.
          capacity: Tokens that a state which grows with the text has room for; 256 if None.
        """
        embedding = self.embedder.input_embedding
        dtype = dtype or embedding.dtype
        return init_cache(self.config, batch_size, dtype, embedding.device, capacity)

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.parameters())
        return f"Model({self.config!r}, {size:,} parameters)"
