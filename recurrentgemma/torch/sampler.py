"""Sampling text from a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recurrentgemma.common.generation.results import SamplerOutput
from recurrentgemma.common.generation.sampler import BaseSampler
from recurrentgemma.common.generation.strategies import Sampling
from recurrentgemma.torch.engine import ModelEngine
from recurrentgemma.torch.model import Model

__all__ = ["Sampler", "SamplerOutput"]


class Sampler(BaseSampler[Tensor]):
    """Text from a model; call it, or iterate over `stream`."""

    engine: ModelEngine  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        model: Model,
        vocab: Any,
        greedy_sampling: bool = True,
        is_it_model: bool = False,
        *,
        sampling: Sampling | None = None,
        allow_control_tokens: bool = False,
        jit_compile: bool = False,
    ) -> None:
        """Prepares to sample.

        Args:
          model: The model, with its parameters.
          vocab: Its tokenizer: a `Tokenizer`, or what that class takes: a path, or a tokenizer of
            sentencepiece, `tokenizers` or `transformers`.
          greedy_sampling: Whether to take the most likely token, else draw one; `sampling` says
            more.
          is_it_model: Whether the model is instruction-tuned: prompts are put into the chat
            template, and `<end_of_turn>` ends a row.
          sampling: How tokens are chosen.
          allow_control_tokens: Whether `<end_of_turn>` and the like, spelled in a user's words,
            are tokens; they are text if not.
          jit_compile: Whether to compile the decode step with `torch.compile`: the first token of a
            batch size takes long, every later one less.

        Raises:
          ValueError: The model is instruction-tuned and its vocabulary has no `<end_of_turn>`.
        """
        engine = ModelEngine(model, jit_compile)
        super().__init__(
            engine, vocab, sampling, greedy_sampling, is_it_model, allow_control_tokens
        )

    @property
    def model(self) -> Model:
        """The model, with its parameters; another with the same config may take its place."""
        return self.engine.model

    @model.setter
    def model(self, model: Model) -> None:
        self.engine.model = model

    def _seed(self, rng: Any) -> Any:
        if rng is None or isinstance(rng, torch.Generator):
            # A generator, or torch's global one, gives the seed and moves on.
            device = "cpu" if rng is None else rng.device
            return int(torch.randint(2**62, (), generator=rng, device=device))
        return rng
