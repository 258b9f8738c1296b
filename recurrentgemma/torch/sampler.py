"""Sampling text from a Griffin model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import sentencepiece as spm
import torch
from torch import Tensor

from recurrentgemma.common.sampler import BaseSampler, SamplerOutput
from recurrentgemma.common.text import Tokenizer
from recurrentgemma.torch.cache import Cache
from recurrentgemma.torch.griffin import Griffin
from recurrentgemma.torch.sampling import Sampling, draw

__all__ = ["Sampler", "SamplerOutput"]


class Sampler(BaseSampler[Tensor]):
    """Text from a model; call it, or iterate over `stream`.

    Attributes:
      model: The model, with its parameters.
    """

    def __init__(
        self,
        model: Griffin,
        vocab: spm.SentencePieceProcessor | Tokenizer,
        greedy_sampling: bool = True,
        is_it_model: bool = False,
        *,
        sampling: Sampling | None = None,
    ) -> None:
        """Prepares to sample.

        Args:
          model: The model, with its parameters.
          vocab: Its vocabulary.
          greedy_sampling: Whether to take the most likely token, else draw one; `sampling` says
            more.
          is_it_model: Whether the model is instruction-tuned: prompts are put into the chat
            template, and `<end_of_turn>` ends a row.
          sampling: How tokens are chosen.
        """
        super().__init__(model.config, vocab, sampling, greedy_sampling, is_it_model)
        self.model = model

    @torch.no_grad()
    def _forward(
        self, tokens: np.ndarray, segment_pos: np.ndarray, cache: Cache | None, all_logits: bool
    ) -> tuple[Tensor, Cache]:
        return self.model(
            tokens=tokens, segment_pos=segment_pos, cache=cache, last_logits_only=not all_logits
        )

    def _seed(self, rng: torch.Generator | int | None, num_rows: int) -> list[torch.Generator]:
        if not isinstance(rng, int | np.integer):
            # A generator, or torch's global one, gives the seed and moves on.
            rng = int(torch.randint(2**62, (), generator=rng))
        rng = int(rng)
        device = self.model.embedder.input_embedding.device
        generators = []
        for row in range(num_rows):
            seed = np.random.SeedSequence([abs(rng), int(rng < 0), row])
            state = int(seed.generate_state(1, np.uint64)[0])
            generators.append(torch.Generator(device).manual_seed(state >> 1))
        return generators

    @torch.no_grad()
    def _draw(self, logits: Tensor, draws: list[torch.Generator], step: int) -> np.ndarray:
        del step  # generators move on by themselves
        return draw(self.sampling, logits, draws).cpu().numpy()

    def _array(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int32)

    def _concatenate(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))
