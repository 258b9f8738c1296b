"""What both samplers share: checks, the generation loop, and how its results are put together."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import sentencepiece as spm

from recurrentgemma.common.config import GriffinConfig
from recurrentgemma.common.sampling import Categorical, Greedy, Sampling
from recurrentgemma.common.text import StreamDecoder, Tokenizer, apply_it_formatter, pad_left

PREFILL_CHUNK = 2048
_Array = TypeVar("_Array")


class SamplerOutput(NamedTuple, Generic[_Array]):
    """What a sampler returns, one entry a row.

    Attributes:
      text: The generated text, with `echo` behind the prompt's.
      tokens: The generated token ids with the one that stopped the row, with `echo` behind the
        prompt's.
      logits: Row i scores `tokens[i]` (zeros for a prompt's first token, which nothing scores);
        None unless asked for.
    """

    text: list[str]
    tokens: list[_Array]
    logits: list[_Array] | None


class Step(NamedTuple):
    """One generated token a row.

    Attributes:
      tokens: Token ids, [B].
      active: The rows that they count for: those that had not ended before, [B].
      logits: What the tokens were drawn from, [B, V], on the device.
      last: Whether no step follows.
    """

    tokens: np.ndarray
    active: np.ndarray
    logits: Any
    last: bool


class BaseSampler(abc.ABC, Generic[_Array]):
    """Text from a model. The twins add what runs on their framework.

    Attributes:
      config: The model's configuration.
      tokenizer: The vocabulary with its special tokens.
      sampling: How tokens are chosen.
      is_it_model: Whether prompts are put into the chat template and `<end_of_turn>` ends a row.
    """

    # Whether prompt lengths are rounded up so that only a few are ever compiled.
    _buckets = False

    def __init__(
        self,
        config: GriffinConfig,
        vocab: spm.SentencePieceProcessor | Tokenizer,
        sampling: Sampling | None,
        greedy: bool,
        is_it_model: bool,
    ) -> None:
        self.config = config
        self.tokenizer = vocab if isinstance(vocab, Tokenizer) else Tokenizer(vocab)
        self.sampling: Sampling = sampling or (Greedy() if greedy else Categorical())
        self.is_it_model = is_it_model

    def __call__(
        self,
        input_strings: Sequence[str],
        total_generation_steps: int,
        *,
        rng: Any = None,
        echo: bool = False,
        return_logits: bool = False,
        end_sampling_at_eos_token: bool = True,
    ) -> SamplerOutput[_Array]:
        """Continues each prompt.

        Args:
          input_strings: Prompts; they may differ in length and be empty.
          total_generation_steps: At most this many tokens a row.
          rng: Seed of the draws: an integer or the framework's own; fresh if None. A row's draws do
            not depend on the other rows.
          echo: Whether to return the prompts too.
          return_logits: Whether to return logits.
          end_sampling_at_eos_token: Whether a row ends at EOS (and, of an instruction-tuned model,
            at `<end_of_turn>`).

        Raises:
          ValueError: The prompts are no sequence of strings, hold tokens outside the vocabulary, or
            the number of steps is no integer of at least 0.
        """
        prompts = self._encode(input_strings)
        steps = _checked_steps(total_generation_steps)
        if not prompts:
            return SamplerOutput([], [], [] if return_logits else None)
        prompt_logits, last_logits, cache = self._prefill(
            prompts, all_logits=echo and return_logits
        )
        stop_ids = self._stop_ids(end_sampling_at_eos_token)
        draws = self._seed(rng, len(prompts))
        generated: list[list[int]] = [[] for _ in prompts]
        step_logits: list[Any] = []
        for step in self._generate(prompts, steps, stop_ids, last_logits, cache, draws):
            for row in np.flatnonzero(step.active):
                generated[row].append(int(step.tokens[row]))
            if return_logits:
                step_logits.append(step.logits)
        logits: list[Any] | None = None
        if return_logits:
            scores = self._concatenate([last_logits[None][:0], *(z[None] for z in step_logits)])
            logits = [scores[: len(new), row] for row, new in enumerate(generated)]
            if echo:
                of_prompts = self._prompt_scores(prompts, prompt_logits)
                pairs = zip(of_prompts, logits, strict=True)
                logits = [self._concatenate(pair) for pair in pairs]
        if echo:
            generated = [prompt + new for prompt, new in zip(prompts, generated, strict=True)]
        return SamplerOutput(
            text=[self.tokenizer.decode(row) for row in generated],
            tokens=[self._array(row) for row in generated],
            logits=logits,
        )

    def stream(
        self,
        input_string: str,
        total_generation_steps: int,
        *,
        rng: Any = None,
        end_sampling_at_eos_token: bool = True,
    ) -> Iterator[tuple[int, str]]:
        """Continues one prompt, a token at a time.

        Yields:
          Each token id with the text that became certain with it, which is never half a character
          and may be empty; together the texts are what `__call__` returns.
        """
        prompts = self._encode([input_string])
        steps = _checked_steps(total_generation_steps)
        return self._stream(prompts, steps, rng, self._stop_ids(end_sampling_at_eos_token))

    def _stream(
        self, prompts: list[list[int]], steps: int, rng: Any, stop_ids: frozenset[int]
    ) -> Iterator[tuple[int, str]]:
        if not steps:
            return
        decoder = StreamDecoder(self.tokenizer)
        _, last_logits, cache = self._prefill(prompts, all_logits=False)
        draws = self._seed(rng, 1)
        for step in self._generate(prompts, steps, stop_ids, last_logits, cache, draws):
            token = int(step.tokens[0])
            text = decoder.add(token)
            yield token, text + decoder.flush() if step.last else text

    def _encode(self, input_strings: Sequence[str]) -> list[list[int]]:
        strings = [] if input_strings is None else list(input_strings)
        if isinstance(input_strings, str | None) or not all(isinstance(s, str) for s in strings):
            raise ValueError(f"input_strings must be a sequence of strings, got {input_strings!r}")
        texts = map(apply_it_formatter, strings) if self.is_it_model else strings
        prompts = [self.tokenizer.encode(text) for text in texts]
        for row, prompt in enumerate(prompts):
            outside = [token for token in prompt if token >= self.config.vocab_size]
            if outside:
                raise ValueError(
                    f"prompt {row} has tokens outside the model's vocabulary of "
                    f"{self.config.vocab_size}: {outside[:5]}; is this the model's tokenizer?"
                )
        return prompts

    def _stop_ids(self, end_sampling_at_eos_token: bool) -> frozenset[int]:
        if not end_sampling_at_eos_token:
            return frozenset()
        stops = {self.tokenizer.eos_id}
        if self.is_it_model and self.tokenizer.end_of_turn_id is not None:
            stops.add(self.tokenizer.end_of_turn_id)
        return frozenset(stops)

    def _prefill(self, prompts: list[list[int]], *, all_logits: bool) -> tuple[list[Any], Any, Any]:
        """Reads the prompts; logits of all their places by chunk, of the last place, the state."""
        lengths = prefill_lengths(max(map(len, prompts)), buckets=self._buckets)
        tokens, segment_pos = pad_left(prompts, self.tokenizer.pad_id, sum(lengths))
        cache, logits, prompt_logits, start = None, None, [], 0
        for length in lengths:
            chunk = slice(start, start + length)
            logits, cache = self._forward(
                tokens[:, chunk], segment_pos[:, chunk], cache, all_logits
            )
            if all_logits:
                prompt_logits.append(logits)
            start += length
        assert logits is not None
        return prompt_logits, logits[:, -1], cache

    def _prompt_scores(self, prompts: list[list[int]], chunks: list[Any]) -> list[Any]:
        """Per row, what scored each token of its prompt, [T, V]: zeros for the first."""
        scores = []
        for row, prompt in enumerate(prompts):
            places = self._concatenate([chunk[row] for chunk in chunks])[-len(prompt) :]
            scores.append(self._concatenate([0 * places[:1], places[:-1]]))
        return scores

    def _generate(
        self,
        prompts: list[list[int]],
        steps: int,
        stop_ids: frozenset[int],
        logits: Any,
        cache: Any,
        draws: Any,
    ) -> Iterator[Step]:
        """Yields a step at a time until every row has ended.

        A row that has ended is fed padding, which changes nothing.
        """
        active = np.ones(len(prompts), bool)
        position = np.array([len(prompt) for prompt in prompts], np.int32)
        for step in range(steps):
            chosen = self._draw(logits, draws, step)
            still_active = active & ~np.isin(chosen, list(stop_ids))
            last = step + 1 == steps or not still_active.any()
            yield Step(chosen, active, logits, last)
            if last:
                return
            active = still_active
            tokens = np.where(active, chosen, self.tokenizer.pad_id).astype(np.int32)
            segment_pos = np.where(active, position + step, -1).astype(np.int32)
            logits, cache = self._forward(tokens[:, None], segment_pos[:, None], cache, False)
            logits = logits[:, -1]

    @abc.abstractmethod
    def _forward(
        self, tokens: np.ndarray, segment_pos: np.ndarray, cache: Any, all_logits: bool
    ) -> tuple[Any, Any]:
        """Logits of all places or of the last, [B, T or 1, V], and the state."""

    @abc.abstractmethod
    def _seed(self, rng: Any, num_rows: int) -> Any:
        """The source of random draws: one stream a row."""

    @abc.abstractmethod
    def _draw(self, logits: Any, draws: Any, step: int) -> np.ndarray:
        """Tokens [B] from logits [B, V]."""

    @abc.abstractmethod
    def _array(self, tokens: list[int]) -> _Array:
        """Token ids as the framework's array."""

    @abc.abstractmethod
    def _concatenate(self, parts: Sequence[Any]) -> Any:
        """Arrays joined along their first axis."""


def prefill_lengths(longest: int, *, buckets: bool) -> list[int]:
    """Lengths of the chunks in which prompts are read.

    Full chunks come last, so that with `buckets` only the first has a length of its own, rounded up
    to a power of two: few lengths occur, and each is compiled once.
    """
    full, rest = divmod(longest, PREFILL_CHUNK)
    if buckets and rest:
        rest = max(16, 1 << (rest - 1).bit_length())
    return [rest] * (rest > 0) + [PREFILL_CHUNK] * full


def _checked_steps(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 0:
        raise ValueError(f"total_generation_steps must be an integer of at least 0, got {steps!r}")
    return int(steps)
