"""Sampling text from a model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from recurrentgemma.common.generation.results import SamplerOutput
from recurrentgemma.common.generation.sampler import BaseSampler
from recurrentgemma.common.generation.strategies import Sampling
from recurrentgemma.jax.engine import ModelEngine
from recurrentgemma.jax.model import Model
from recurrentgemma.jax.runtime.trees import Params

__all__ = ["Sampler", "SamplerOutput"]


class Sampler(BaseSampler[Array]):
    """Text from a model; call it, or iterate over `stream`."""

    engine: ModelEngine  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        model: Model,
        vocab: Any,
        params: Params,
        jit_compile: bool = True,
        deterministic_sampling: bool = True,
        is_it_model: bool = False,
        *,
        sampling: Sampling | None = None,
        allow_control_tokens: bool = False,
    ) -> None:
        """Prepares to sample.

        Args:
          model: The model.
          vocab: Its tokenizer: a `Tokenizer`, or what that class takes: a path, or a tokenizer of
            sentencepiece, `tokenizers` or `transformers`.
          params: Its parameters, with or without a `params` level; NumPy arrays go to the device
            once.
          jit_compile: Whether to compile; False helps with debugging.
          deterministic_sampling: Whether to take the most likely token, else draw one; `sampling`
            says more.
          is_it_model: Whether the model is instruction-tuned: prompts are put into the chat
            template, and `<end_of_turn>` ends a row.
          sampling: How tokens are chosen.
          allow_control_tokens: Whether `<end_of_turn>` and the like, spelled in a user's words,
            are tokens; they are text if not.

        Raises:
          ValueError: The parameters do not match the model's config, and the message names every
            difference; or the model is instruction-tuned and its vocabulary has no
            `<end_of_turn>`.
        """
        engine = ModelEngine(model, params, jit_compile)
        super().__init__(
            engine, vocab, sampling, deterministic_sampling, is_it_model, allow_control_tokens
        )

    @property
    def model(self) -> Model:
        """The model; another takes its place with its own parameters, assigned after it."""
        return self.engine.model

    @model.setter
    def model(self, model: Model) -> None:
        self.engine.model = model

    @property
    def params(self) -> Params:
        """The parameters; assign others, trained ones say, to sample from those."""
        return self.engine.params

    @params.setter
    def params(self, params: Params) -> None:
        self.engine.params = params

    def _seed(self, rng: Any) -> Any:
        if rng is None:
            return np.random.SeedSequence().entropy
        return _as_seeds(rng)


def _as_seeds(rng: Any) -> Any:
    """Keys, alone or several, as the integers of their bits; anything else as it is."""
    if isinstance(rng, list | tuple) or (_is_key(rng) and rng.ndim):
        return [_as_seeds(key) for key in rng]
    if _is_key(rng):
        rng = jax.random.key_data(rng)
    elif not isinstance(rng, Array) or rng.dtype != jnp.uint32 or rng.shape != _old_key().shape:
        return rng
    return int.from_bytes(np.asarray(rng).tobytes(), "little")


def _is_key(rng: Any) -> bool:
    return isinstance(rng, Array) and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)


def _old_key() -> jax.ShapeDtypeStruct:
    """What `jax.random.PRNGKey` gives: an array of integers like any other."""
    return jax.eval_shape(jax.random.PRNGKey, 0)
