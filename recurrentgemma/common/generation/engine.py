"""What a framework does for sampling. The loop, the samplers and a server know nothing more."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.generation.settings import RowSettings, Variant
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import grows, state_spec
from recurrentgemma.common.model.state import Arrays, capacity_of, round_capacity

LONG = 64  # tokens


class LogProbs(NamedTuple):
    """Log-probabilities under the model itself: softmax(logits), before any sampling strategy.

    Attributes:
      chosen: For the generated tokens, [N] or a number.
      top_tokens: The likeliest tokens in each place, most likely first, [N, n] or [n].
      top: Their log-probabilities.
    """

    chosen: Any
    top_tokens: Any
    top: Any


class Sampled(NamedTuple):
    """A token a row, or k of them.

    Attributes:
      tokens: Token ids, [B] or [k, B]; -1 where the logits are not finite.
      logprobs: Their log-probabilities, each array with the axes of `tokens` first; None if they
        were not asked for.
      logits: What the tokens were chosen from, [k, B, V]; None if they were not asked for.
    """

    tokens: Any
    logprobs: LogProbs | None = None
    logits: Any = None


class Engine(abc.ABC):
    """A model that runs on a framework, with the steps of sampling.

    A cache is the model's state of B rows, {"blocks.N": named tuple of arrays}, its arrays on the
    device and rows first. Each method that changes a cache may use up the one it is given: keep a
    `snapshot` of what you still need.

    Attributes:
      prefill_chunks: The lengths of the chunks in which prompts are read, so that memory does not
        grow with the prompt. Each is a multiple of the next.
      score_chunks: The same where there are logits in every place, [T, V].
      pads_chunks: Whether only chunks of these lengths are read, since each length is compiled.
      burst: How many tokens a row the loop decodes between two looks from the host.
      long_burst: The same where a text gets `LONG` tokens or more, which pay for compiling such a
        burst; `burst` if that is larger.
      reproducible: Whether no bit of a row's logits may depend on the other rows of a batch.
      prepares: Whether the first prompt compiles what any later one needs. A command reads few
        prompts: it compiles what they need alone.
    """

    prefill_chunks: Sequence[int] = (2048, 256, 32)
    score_chunks: Sequence[int] = (256, 32)
    pads_chunks: bool
    burst: int
    long_burst: int = 1
    reproducible: bool = False
    prepares: bool = True

    def __repr__(self) -> str:
        config, size = self.config, self.num_bytes
        return f"{type(self).__name__}(layers={config.num_layers}, width={config.width}, {size=})"

    @property
    @abc.abstractmethod
    def config(self) -> Config:
        """The model's configuration."""

    @property
    @abc.abstractmethod
    def dtype(self) -> str:
        """The dtype that the model computes in."""

    @property
    @abc.abstractmethod
    def num_bytes(self) -> int:
        """The size of the parameters."""

    @abc.abstractmethod
    def prepare(self, num_rows: int, capacity: int | None = None) -> None:
        """Compiles what reading prompts needs, so that no later prompt of so many rows waits."""

    @abc.abstractmethod
    def begin(self, num_rows: int, capacity: int | None = None) -> Any:
        """A cache before the first token.

        Args:
          num_rows: Number of rows, B.
          capacity: Tokens that a state that grows with the text has room for.
        """

    @abc.abstractmethod
    def prefill(self, cache: Any, tokens: np.ndarray, segment_pos: np.ndarray) -> Any:
        """The cache after a chunk, [B, T]; positions of -1 are padding on the left."""

    @abc.abstractmethod
    def score(
        self, cache: Any, tokens: np.ndarray, segment_pos: np.ndarray, targets: np.ndarray
    ) -> tuple[Any, Any, Any]:
        """Reads a chunk: logits [B, T, V], the targets' log-probabilities [B, T], the cache."""

    @abc.abstractmethod
    def feed(self, cache: Any, tokens: Any, segment_pos: Any) -> tuple[Any, Any]:
        """Reads a token a row, [B]: the logits after it, [B, V], and the cache."""

    @abc.abstractmethod
    def choose(
        self,
        variant: Variant,
        settings: RowSettings,
        logits: Any,
        numbers: Any,
        seen: Any,
    ) -> tuple[Sampled, Any]:
        """A token a row, and `seen` with these tokens.

        Args:
          variant: The parts of a choice that the batch needs.
          settings: How each row chooses, on the device.
          logits: What to choose by, [B, V].
          numbers: The rows' draws, in (0, 1], [B].
          seen: How each row has each token, [B, V] int32: 1 where the text had it at the start,
            and 2 for each time that it was generated; None where no row has a penalty.
        """

    @abc.abstractmethod
    def decode(
        self,
        variant: Variant,
        settings: RowSettings,
        cache: Any,
        seen: Any,
        tokens: np.ndarray,
        segment_pos: np.ndarray,
        left: np.ndarray,
        numbers: np.ndarray,
    ) -> tuple[Sampled, Any, Any]:
        """Feeds and chooses k tokens a row without a look from the host.

        A row ends at its stop ids, or when it has no steps left. From then on it is fed padding,
        which changes nothing; what is chosen for it means nothing.

        Args:
          variant: The parts of a choice that the batch needs.
          settings: How each row chooses and where it ends, on the device.
          cache: The model's state.
          seen: How each row has each token; see `choose`.
          tokens: The last token of each row, [B]; 0 in a row that has ended.
          segment_pos: Their positions, [B]; -1 in a row that has ended.
          left: How many more tokens each row may generate, [B]; 0 in a row that has ended.
          numbers: The rows' draws, in (0, 1], [k, B].

        Returns:
          k tokens a row, the cache after all but the last of them, and `seen` with all.
        """

    @abc.abstractmethod
    def watch(
        self, cache: Any, tokens: np.ndarray, segment_pos: np.ndarray
    ) -> tuple[dict[str, bool], Any]:
        """Reads a chunk without padding, [B, T], to find where values stop being finite; slow.

        Returns:
          Whether what each module puts out is finite, by the names of `activation_names` in the
          order of the forward pass, then "logits"; and the cache.
        """

    @abc.abstractmethod
    def take(self, cache: Any, rows: np.ndarray) -> Any:
        """Copies of these rows of a cache, or of an array with rows first."""

    @abc.abstractmethod
    def put(self, cache: Any, rows: np.ndarray, others: Any) -> Any:
        """The cache with these rows replaced by those of another, or arrays with rows first."""

    def snapshot(self, cache: Any) -> Any:
        """A copy of a cache, which no later step changes."""
        return self.take(cache, np.arange(len(next(iter(cache.values()))[0])))

    def capacity_for(self, tokens: int) -> int | None:
        """The capacity for texts of so many tokens; None where no state grows with the text."""
        return round_capacity(tokens) if grows(self.config) else None

    def grow(self, cache: Any, capacity: int | None) -> Any:
        """The cache with room for so many tokens; the same cache where it has that room."""
        room = capacity_of(self.config, cache)
        if room is None or capacity is None or capacity <= room:
            return cache
        return self.resized(cache, capacity)

    def resized(self, cache: Any, capacity: int | None) -> Any:
        """The cache with room for exactly so many tokens, which are no fewer than it holds."""
        room = capacity_of(self.config, cache)
        if room is None or capacity is None or capacity == room:
            return cache
        cache = dict(cache)
        for spec in state_spec(self.config):
            if spec.grows:
                block, field = spec.path.rsplit(".", 1)
                axis, values = 1 + spec.axes.index("slots"), getattr(cache[block], field)
                if capacity < room:
                    values = values[(slice(None),) * axis + (slice(capacity),)]
                else:
                    values = self.padded(values, axis, capacity - room)
                cache[block] = cache[block]._replace(**{field: values})
        return cache

    @abc.abstractmethod
    def padded(self, values: Any, axis: int, count: int) -> Any:
        """An array with so many zeros behind it along an axis."""

    @abc.abstractmethod
    def on_device(self, values: Any) -> Any:
        """A NumPy array, or a tuple of them, on the model's device."""

    @abc.abstractmethod
    def on_host(self, values: Any) -> np.ndarray:
        """An array of the framework as NumPy's."""

    @abc.abstractmethod
    def owns(self, cache: Any) -> bool:
        """Whether the arrays of a cache are this framework's."""

    @abc.abstractmethod
    def to_numpy(self, cache: Any) -> Arrays:
        """The cache as NumPy arrays, in its own dtypes."""

    @abc.abstractmethod
    def from_numpy(self, arrays: Arrays) -> Any:
        """A cache from NumPy arrays, in the dtype of the model's own state."""
