"""Sampling text from a Griffin model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import sentencepiece as spm
import torch
from torch import Tensor

from recurrentgemma.common.generation.loop import Request
from recurrentgemma.common.generation.output import SamplerOutput
from recurrentgemma.common.generation.sampler import BaseSampler
from recurrentgemma.common.model.state import Arrays, State
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma.torch.cache import Cache, cache_from_numpy, cache_to_numpy
from recurrentgemma.torch.griffin import Griffin
from recurrentgemma.torch.runtime.decode import CapturedStep, Run
from recurrentgemma.torch.sampling import Choice, Sampling, choose

__all__ = ["Sampler", "SamplerOutput"]


class _Prepared(NamedTuple):
    """A model with its decode step, maybe compiled, and that step as captured by batch size."""

    model: Griffin
    step: Callable[..., Any]
    captured: dict[int, CapturedStep]


class Sampler(BaseSampler[Tensor]):
    """Text from a model; call it, or iterate over `stream`.

    Attributes:
      model: The model, with its parameters; another of the same config may take its place.
    """

    def __init__(
        self,
        model: Griffin,
        vocab: spm.SentencePieceProcessor | Tokenizer,
        greedy_sampling: bool = True,
        is_it_model: bool = False,
        *,
        sampling: Sampling | None = None,
        jit_compile: bool = False,
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
          jit_compile: Whether to compile the decode step with `torch.compile`: the first token of a
            batch size takes long, every later one less.

        Raises:
          ValueError: The model is instruction-tuned and its vocabulary has no `<end_of_turn>`.
        """
        super().__init__(model.config, vocab, sampling, greedy_sampling, is_it_model)
        self.model = model
        self._jit_compile = jit_compile
        self._prepared: _Prepared | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled and captured steps, which are made again."""
        return vars(self) | {"_prepared": None}

    def _prepare(self) -> _Prepared:
        """The steps of the model, which may have taken the place of another."""
        if self._prepared is None or self._prepared.model is not self.model:
            step = torch.compile(self.model, dynamic=False) if self._jit_compile else self.model
            self._prepared = _Prepared(self.model, step, {})
        return self._prepared

    def _begin(self, state: State) -> Cache:
        if state.cache is None:
            return self.model.init_cache(state.num_rows)
        return self._take(state.cache, np.arange(state.num_rows))

    @torch.no_grad()
    def _prefill(self, cache: Cache, tokens: np.ndarray, segment_pos: np.ndarray) -> Cache:
        inputs = {"tokens": tokens, "segment_pos": segment_pos}
        return self.model(**inputs, cache=cache, return_logits=False)[1]

    def _run(self, cache: Cache) -> Run:
        return Run(cache)

    @torch.no_grad()
    def _feed(self, run: Run, tokens: np.ndarray, segment_pos: np.ndarray) -> tuple[Tensor, Run]:
        _, step, captured = self._prepare()
        inputs = [torch.from_numpy(z[:, None]) for z in (tokens, segment_pos)]
        if self._device.type == "cuda":
            if len(tokens) not in captured:
                captured[len(tokens)] = CapturedStep(self.model, step, len(tokens))
            return captured[len(tokens)](run, *inputs), run
        logits, run.cache = step(tokens=inputs[0], segment_pos=inputs[1], cache=run.cache)
        return logits[:, 0], run

    @torch.no_grad()
    def _score(
        self, cache: Cache, tokens: np.ndarray, segment_pos: np.ndarray, targets: np.ndarray
    ) -> tuple[Tensor, Tensor, Cache]:
        logits, cache = self.model(tokens=tokens, segment_pos=segment_pos, cache=cache)
        goals = self._on_device(targets).long()
        logprobs = logits.float().log_softmax(-1).gather(-1, goals[..., None])[..., 0]
        return logits, logprobs, cache

    @torch.no_grad()
    def _choose(
        self,
        request: Request,
        logits: Tensor,
        number: np.ndarray,
        seen: Tensor | None,
        fed: np.ndarray,
    ) -> tuple[Choice, Tensor | None]:
        if seen is not None:
            seen[torch.arange(len(fed)), torch.from_numpy(fed).long()] = True
        numbers = self._on_device(number)
        choice = choose(request.sampling, logits, numbers, seen, request.num_logprobs)
        return choice._make(None if part is None else part.cpu() for part in choice), seen

    def _snapshot(self, run: Run) -> Cache:
        return _map(torch.clone, run.cache)

    def _take(self, cache: Cache, rows: np.ndarray) -> Cache:
        index = torch.from_numpy(rows).to(self._device)
        return _map(lambda value: value[index], cache)

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.copy()).to(self._device)

    def _on_host(self, values: Tensor) -> np.ndarray:
        return values.cpu().numpy()

    def _is_own(self, value: Any) -> bool:
        return isinstance(value, Tensor)

    def _to_numpy(self, cache: Cache) -> Arrays:
        return cache_to_numpy(cache)

    def _from_numpy(self, arrays: Arrays) -> Cache:
        dtype = self.model.embedder.input_embedding.dtype
        return cache_from_numpy(self.config, arrays, dtype, self._device)

    def _seed(self, rng: Any) -> Any:
        if rng is None or isinstance(rng, torch.Generator):
            # A generator, or torch's global one, gives the seed and moves on.
            device = "cpu" if rng is None else rng.device
            return int(torch.randint(2**62, (), generator=rng, device=device))
        return rng

    @property
    def _device(self) -> torch.device:
        return self.model.embedder.input_embedding.device


def _map(function, cache: Cache) -> Cache:
    return {name: type(block)(*map(function, block)) for name, block in cache.items()}
