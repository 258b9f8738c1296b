"""The decode step on a GPU, captured once and replayed: one launch for all of its kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from recurrentgemma.torch.cache import Cache
from recurrentgemma.torch.griffin import Griffin

_WARM_UP = 3  # steps before the capture, in which libraries allocate what they need


class Run:
    """A generation's state between two steps.

    Attributes:
      cache: The state; on a GPU the buffers of a captured step while it is that run's turn.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache


class CapturedStep:
    """A CUDA graph of a model's decode step for one batch size, its state updated in place.

    Several runs may take turns: whose turn ends gets a copy of its state. What is captured is
    `step`, the model itself or what compiles it.
    """

    def __init__(self, model: Griffin, step: Callable, batch_size: int) -> None:
        device = model.embedder.input_embedding.device
        self._tokens, self._segment_pos = torch.zeros(
            2, batch_size, 1, dtype=torch.int32, device=device
        )
        self._cache = model.init_cache(batch_size)
        self._owner: weakref.ref[Run] | None = None
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._run(step)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._run(step)

    def __call__(self, run: Run, tokens: Tensor, segment_pos: Tensor) -> Tensor:
        """The logits, [B, V], after a token a row, [B, 1], and `run` moved on."""
        owner = None if self._owner is None else self._owner()
        if owner is not run:
            if owner is not None:
                owner.cache = {
                    name: type(block)(*map(torch.clone, block))
                    for name, block in self._cache.items()
                }
            self._copy_in(run.cache)
            run.cache, self._owner = self._cache, weakref.ref(run)
        self._tokens.copy_(tokens)
        self._segment_pos.copy_(segment_pos)
        self._graph.replay()
        return self._logits.clone()

    def _run(self, step: Callable) -> Tensor:
        logits, cache = step(tokens=self._tokens, segment_pos=self._segment_pos, cache=self._cache)
        self._copy_in(cache)
        return logits[:, 0]

    def _copy_in(self, cache: Cache) -> None:
        for name, block in cache.items():
            for buffer, value in zip(self._cache[name], block, strict=True):
                buffer.copy_(value)
