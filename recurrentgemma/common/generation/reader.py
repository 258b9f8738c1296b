"""How texts are read: in chunks, into a state."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from recurrentgemma.common.generation.chunks import chunk_lengths
from recurrentgemma.common.generation.loop import Engine
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.state import Arrays, State, empty_state
from recurrentgemma.common.tokenizer import pad_left


class Reader(Engine):
    """Reads texts. The twins add what runs on their framework.

    Attributes:
      config: The model's configuration.
      tokenizer: The vocabulary with its special tokens.
      prefill_chunks: The lengths of the chunks in which prompts are read, so that memory does not
        grow with the prompt, each a multiple of the next. Where programs are compiled no others
        occur.
      score_chunks: Likewise where there are logits in every place, [T, V].
    """

    config: GriffinConfig
    prefill_chunks: Sequence[int] = (2048, 256, 32)
    score_chunks: Sequence[int] = (256, 32)
    # Whether prompts are padded to whole chunks, so that only a few lengths are ever compiled.
    _buckets = False

    def _repeated(self, state: State, samples: int) -> State:
        """The state with each row several times, read once."""
        if samples == 1:
            return state
        state = self._read_state(state)
        rows = np.repeat(np.arange(state.num_rows), samples)
        return State(
            self.config,
            None if state.cache is None else self._take(state.cache, rows),
            tuple(state.lengths[row] for row in rows),
            tuple(state.pending[row] for row in rows),
            state.seen[rows],
        )

    def _read_state(self, state: State) -> State:
        """The state with all but the last of its pending tokens read."""
        run, last, lengths = self._read(state)
        pending = tuple((int(token),) for token in last)
        return State(self.config, self._snapshot(run), tuple(lengths.tolist()), pending, state.seen)

    def _read(self, state: State) -> tuple[Any, np.ndarray, np.ndarray]:
        rows = [tokens[:-1] for tokens in state.pending]
        lengths = chunk_lengths(max(map(len, rows)), self.prefill_chunks, pad=self._buckets)
        tokens, segment_pos = pad_left(
            rows, self.tokenizer.pad_id, sum(lengths), starts=state.lengths
        )
        cache = self._begin(state)
        start = 0
        for length in lengths:
            chunk = slice(start, start + length)
            cache = self._prefill(cache, tokens[:, chunk], segment_pos[:, chunk])
            start += length
        last = np.array([row[-1] for row in state.pending], np.int32)
        read = np.array(state.lengths, np.int32) + np.array(list(map(len, rows)), np.int32)
        return self._run(cache), last, read

    def _scored(
        self, tokens: list[int], return_logits: bool = False
    ) -> Iterable[tuple[Any, np.ndarray]]:
        """Of all tokens but the first, by chunk: logits [T, V] or None, log-probabilities [T].

        Padding is cut off here and not on the device, where each length would be compiled.
        """
        inputs, targets = tokens[:-1], tokens[1:]
        lengths = chunk_lengths(len(inputs), self.score_chunks, pad=self._buckets)
        padded, segment_pos = pad_left([inputs], self.tokenizer.pad_id, sum(lengths))
        goals, _ = pad_left([targets], self.tokenizer.pad_id, sum(lengths))
        cache = self._begin(empty_state(self.config, 1))
        start, padding = 0, sum(lengths) - len(inputs)
        for length in lengths:
            chunk = slice(start, start + length)
            logits, logprobs, cache = self._score(
                cache, padded[:, chunk], segment_pos[:, chunk], goals[:, chunk]
            )
            new = slice(max(padding - start, 0), None)
            scores = self._on_host(logits)[0, new] if return_logits else None
            yield scores, self._on_host(logprobs)[0, new]
            start += length

    def _prompt_logits(self, prompt: list[int]) -> np.ndarray:
        """What scored each token of a prompt, [T, V]: zeros for the first."""
        first = np.zeros((1, self.config.vocab_size), np.float32)
        return np.concatenate([first, *(z for z, _ in self._scored(prompt, return_logits=True))])

    @abc.abstractmethod
    def _seed(self, rng: Any) -> Any:
        """Integers from the framework's own source of randomness or, of None, fresh ones."""

    @abc.abstractmethod
    def _begin(self, state: State) -> Any:
        """A cache like the state's, or of its rows before the first token, that may be changed."""

    @abc.abstractmethod
    def _prefill(self, cache: Any, tokens: np.ndarray, segment_pos: np.ndarray) -> Any:
        """The cache after a chunk, [B, T]; the one given may be gone."""

    @abc.abstractmethod
    def _run(self, cache: Any) -> Any:
        """What `_feed` takes, from a cache that may be changed."""

    @abc.abstractmethod
    def _score(
        self, cache: Any, tokens: np.ndarray, segment_pos: np.ndarray, targets: np.ndarray
    ) -> tuple[Any, Any, Any]:
        """Logits [B, T, V], the targets' log-probabilities [B, T], and the cache."""

    @abc.abstractmethod
    def _take(self, cache: Any, rows: np.ndarray) -> Any:
        """A cache of copies of these rows."""

    @abc.abstractmethod
    def _is_own(self, value: Any) -> bool:
        """Whether it is an array of this framework."""

    @abc.abstractmethod
    def _to_numpy(self, cache: Any) -> Arrays:
        """The cache as NumPy arrays, bfloat16 as float32."""

    @abc.abstractmethod
    def _from_numpy(self, arrays: Arrays) -> Any:
        """The inverse, in the dtype of the model's own state."""

    @abc.abstractmethod
    def _on_host(self, values: Any) -> np.ndarray:
        """An array of the framework as NumPy's."""
