"""Sampling text from a Griffin model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece as spm
from flax.typing import Dtype
from jax import Array

from recurrentgemma.common.config import shapes_of
from recurrentgemma.common.layer_spec import layer_spec, require_match
from recurrentgemma.common.sampler import BaseSampler, SamplerOutput
from recurrentgemma.common.text import Tokenizer
from recurrentgemma.jax.cache import Cache
from recurrentgemma.jax.griffin import Griffin, Params
from recurrentgemma.jax.sampling import Sampling, draw

__all__ = ["Sampler", "SamplerOutput"]


class Sampler(BaseSampler[Array]):
    """Text from a model; call it, or iterate over `stream`.

    Attributes:
      model: The model.
    """

    _buckets = True

    def __init__(
        self,
        model: Griffin,
        vocab: spm.SentencePieceProcessor | Tokenizer,
        params: Params,
        jit_compile: bool = True,
        deterministic_sampling: bool = True,
        is_it_model: bool = False,
        *,
        sampling: Sampling | None = None,
    ) -> None:
        """Prepares to sample.

        Args:
          model: The model.
          vocab: Its vocabulary.
          params: Its parameters, with or without a `params` level.
          jit_compile: Whether to compile; False helps with debugging.
          deterministic_sampling: Whether to take the most likely token, else draw one; `sampling`
            says more.
          is_it_model: Whether the model is instruction-tuned: prompts are put into the chat
            template, and `<end_of_turn>` ends a row.
          sampling: How tokens are chosen.

        Raises:
          ValueError: The parameters do not match the model's config; every difference is named.
        """
        super().__init__(model.config, vocab, sampling, deterministic_sampling, is_it_model)
        self.model = model
        self.params = params
        self._jit_compile = jit_compile

    @property
    def params(self) -> Params:
        """The parameters; assign others, trained ones say, to sample from those."""
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        params = params.get("params", params)
        expected = {spec.path: spec.shape for spec in layer_spec(self.config)}
        require_match(expected, shapes_of(params))
        self._params = params

    def _forward(
        self, tokens: np.ndarray, segment_pos: np.ndarray, cache: Cache | None, all_logits: bool
    ) -> tuple[Array, Cache]:
        if cache is None:  # so that a first chunk compiles as any other
            cache = self.model.init_cache(len(tokens), self._compute_dtype())
        forward = _compiled_forward if self._jit_compile else _forward
        return forward(self.model, self.params, tokens, segment_pos, cache, not all_logits)

    def _compute_dtype(self) -> Dtype:
        return self.model.dtype or jnp.result_type(*jax.tree.leaves(self.params))

    def _seed(self, rng: Array | int | None, num_rows: int) -> Array:
        if rng is None or isinstance(rng, int | np.integer):
            entropy = None if rng is None else [abs(int(rng)), int(rng < 0)]
            seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
            rng = jax.random.key(seed)
        key = rng
        return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(num_rows))

    def _draw(self, logits: Array, draws: Array, step: int) -> np.ndarray:
        choose = _compiled_draw if self._jit_compile else draw
        return np.asarray(choose(self.sampling, logits, draws, step))

    def _array(self, tokens: list[int]) -> Array:
        return jnp.asarray(tokens, jnp.int32)

    def _concatenate(self, parts: Sequence[Array]) -> Array:
        return jnp.concatenate(list(parts))


def _forward(
    model: Griffin,
    params: Params,
    tokens: Array | np.ndarray,
    segment_pos: Array | np.ndarray,
    cache: Cache,
    last_logits_only: bool,
) -> tuple[Array, Cache]:
    inputs: dict[str, Any] = {"tokens": tokens, "segment_pos": segment_pos, "cache": cache}
    result: Any = model.apply({"params": params}, **inputs, last_logits_only=last_logits_only)
    return result


# Shared by all samplers: another of the same model and shapes compiles nothing.
_compiled_forward = jax.jit(_forward, static_argnames=("model", "last_logits_only"))
_compiled_draw = jax.jit(draw, static_argnames=("sampling",))
