"""The decode step on a GPU, captured once and replayed: one launch for all of its kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from recurrentgemma.torch.cache import Cache
from recurrentgemma.torch.runtime.arrays import map_cache

_WARM_UP = 3  # steps before the capture, in which libraries allocate what they need


class LentCache(dict):
    """A captured step's own buffers while the step works on one text, and copies after that."""


class CapturedStep:
    """A CUDA graph of a model's decode step for one batch size, its state updated in place.

    Several texts may take turns: when another one's turn comes, the cache that was lent to the
    first gets copies. `step` is the model itself or what compiles it.
    """

    def __init__(self, step: Callable, cache: Cache) -> None:
        some = next(iter(cache.values()))[0]
        self._tokens, self._segment_pos = torch.zeros(
            2, len(some), 1, dtype=torch.int32, device=some.device
        )
        self._cache = map_cache(torch.zeros_like, cache)
        self._lent: weakref.ref[LentCache] | None = None
        stream = torch.cuda.Stream(some.device)
        stream.wait_stream(torch.cuda.current_stream(some.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._run(step)
        torch.cuda.current_stream(some.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._run(step)

    def __call__(
        self, cache: Cache, tokens: Tensor, segment_pos: Tensor
    ) -> tuple[Tensor, LentCache]:
        """The logits, [B, V], after a token a row, [B, 1], and the cache after it."""
        lent = None if self._lent is None else self._lent()
        if lent is None or lent is not cache:
            if lent is not None:
                lent.update(map_cache(torch.clone, self._cache))
            self._copy_in(cache)
            lent = LentCache(self._cache)
            self._lent = weakref.ref(lent)
        self._tokens.copy_(tokens)
        self._segment_pos.copy_(segment_pos)
        self._graph.replay()
        return self._logits.clone(), lent

    def _run(self, step: Callable) -> Tensor:
        logits, cache = step(tokens=self._tokens, segment_pos=self._segment_pos, cache=self._cache)
        self._copy_in(cache)
        return logits[:, 0]

    def _copy_in(self, cache: Cache) -> None:
        map_cache(lambda buffer, value: buffer.copy_(value), self._cache, cache)
