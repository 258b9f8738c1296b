"""A model as an engine of text generation: eager or compiled steps, CUDA graphs on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recurrentgemma.common.generation.engine import Engine, LogProbs, Sampled
from recurrentgemma.common.generation.settings import RowSettings, Variant
from recurrentgemma.common.model.activations import activation_names
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.state import Arrays
from recurrentgemma.torch.cache import Cache, cache_from_numpy, cache_to_numpy
from recurrentgemma.torch.capture import activations
from recurrentgemma.torch.model import Model
from recurrentgemma.torch.quantization import QuantizedMatrix, keep_values
from recurrentgemma.torch.runtime.arrays import map_cache
from recurrentgemma.torch.runtime.decode import CapturedStep
from recurrentgemma.torch.runtime.steps import giving_up
from recurrentgemma.torch.runtime.stored import PackedMatrix
from recurrentgemma.torch.sampling import choose


class _Prepared(NamedTuple):
    """A model with its decode step, maybe compiled, and that step as captured by shapes."""

    model: Model
    step: Callable[..., Any]
    captured: dict[Any, CapturedStep]


class ModelEngine(Engine):
    """The `Engine` of a model with its parameters.

    Attributes:
      model: The model; another with the same config may take its place.
    """

    pads_chunks = False

    def __init__(self, model: Model, jit_compile: bool = False) -> None:
        """Prepares the steps.

        Args:
          model: The model, with its parameters.
          jit_compile: Whether to compile the decode step with `torch.compile`.
        """
        self.model = model
        self._jit_compile = jit_compile
        self._prepared: _Prepared | None = None
        self.burst = 1 if self._device.type == "cpu" else 8

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled and captured steps, which are made again."""
        return vars(self) | {"_prepared": None}

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def dtype(self) -> str:
        return str(self.model.embedder.input_embedding.dtype).removeprefix("torch.")

    @property
    def num_bytes(self) -> int:
        kinds = QuantizedMatrix, PackedMatrix
        matrices = (m for m in self.model.modules() if isinstance(m, kinds))
        return sum(held.nbytes for held in (*self.model.parameters(), *matrices))

    def prepare(self, num_rows: int, capacity: int | None = None) -> None:
        """Nothing is compiled to read prompts."""

    def begin(self, num_rows: int, capacity: int | None = None) -> Cache:
        return self.model.init_cache(num_rows, capacity=capacity)

    @torch.no_grad()
    def prefill(self, cache: Cache, tokens: np.ndarray, segment_pos: np.ndarray) -> Cache:
        inputs = {"tokens": tokens, "segment_pos": segment_pos}
        return self.model(**inputs, cache=cache, return_logits=False)[1]

    @torch.no_grad()
    def score(
        self, cache: Cache, tokens: np.ndarray, segment_pos: np.ndarray, targets: np.ndarray
    ) -> tuple[Tensor, Tensor, Cache]:
        logits, cache = self.model(tokens=tokens, segment_pos=segment_pos, cache=cache)
        goals = self.on_device(targets).long()
        logprobs = logits.float().log_softmax(-1).gather(-1, goals[..., None])[..., 0]
        return logits, logprobs, cache

    @torch.no_grad()
    def feed(self, cache: Cache, tokens: Tensor, segment_pos: Tensor) -> tuple[Tensor, Cache]:
        _, step, captured = self._prepare()
        tokens, segment_pos = tokens[:, None], segment_pos[:, None]
        if self._device.type == "cuda":
            key = tuple(value.shape for block in cache.values() for value in block)
            if key not in captured:
                captured[key] = CapturedStep(step, cache)
            return captured[key](cache, tokens, segment_pos)
        with giving_up(self.reproducible):
            logits, cache = step(tokens=tokens, segment_pos=segment_pos, cache=cache)
        return logits[:, 0], cache

    @torch.no_grad()
    def choose(
        self,
        variant: Variant,
        settings: RowSettings,
        logits: Tensor,
        numbers: Tensor,
        seen: Tensor | None,
    ) -> tuple[Sampled, Tensor | None]:
        sampled = choose(variant, settings, logits, numbers, seen)
        if seen is not None:
            seen[torch.arange(len(seen), device=seen.device), sampled.tokens] += 2
        return sampled, seen

    @torch.no_grad()
    def decode(
        self,
        variant: Variant,
        settings: RowSettings,
        cache: Cache,
        seen: Tensor | None,
        tokens: np.ndarray,
        segment_pos: np.ndarray,
        left: np.ndarray,
        numbers: np.ndarray,
    ) -> tuple[Sampled, Cache, Tensor | None]:
        fed, position, left_, draws = map(self.on_device, (tokens, segment_pos, left, numbers))
        steps = []
        for number in draws:  # the host runs ahead: nothing here waits for the device
            logits, cache = self.feed(cache, fed, position)
            sampled, seen = self.choose(variant, settings, logits, number, seen)
            ended = (sampled.tokens[:, None] == settings.stop_ids).any(-1)
            left_ = torch.where(ended, 0, left_ - 1).clamp(min=0)
            fed = torch.where(left_ > 0, sampled.tokens, 0).clamp(min=0).to(fed.dtype)
            position = torch.where(left_ > 0, position + 1, -1)
            steps.append(sampled._replace(logits=logits if variant.logits else None))
        tokens_, logprobs, logits = zip(*steps, strict=True)
        return (
            Sampled(
                torch.stack(tokens_),
                logprobs[0] and LogProbs(*map(torch.stack, zip(*logprobs, strict=True))),
                torch.stack(logits) if variant.logits else None,
            ),
            cache,
            seen,
        )

    @torch.no_grad()
    def watch(
        self, cache: Cache, tokens: np.ndarray, segment_pos: np.ndarray
    ) -> tuple[dict[str, bool], Cache]:
        places, names = self.on_device(segment_pos), activation_names(self.config, inside=True)
        outputs, logits, cache = activations(
            self.model, self.on_device(tokens), places, cache, names=names
        )
        return {
            name: bool(torch.isfinite(output).all())
            for name, output in (outputs | {"logits": logits}).items()
        }, cache

    def take(self, cache: Any, rows: np.ndarray) -> Any:
        index = self.on_device(rows)
        return map_cache(lambda value: value[index], cache)

    def put(self, cache: Any, rows: np.ndarray, others: Any) -> Any:
        index = self.on_device(rows).long()
        map_cache(lambda value, other: value.index_copy_(0, index, other), cache, others)
        return cache

    def padded(self, values: Tensor, axis: int, count: int) -> Tensor:
        shape = [count if place == axis else size for place, size in enumerate(values.shape)]
        return torch.cat([values, values.new_zeros(shape)], axis)

    def on_device(self, values: Any) -> Any:
        if isinstance(values, tuple):
            return type(values)(*map(self.on_device, values))
        return torch.from_numpy(values.copy()).to(self._device)

    def on_host(self, values: Any) -> np.ndarray:
        return values.cpu().numpy()

    def owns(self, cache: Any) -> bool:
        return all(isinstance(value, Tensor) for block in cache.values() for value in block)

    def to_numpy(self, cache: Cache) -> Arrays:
        return cache_to_numpy(cache)

    def from_numpy(self, arrays: Arrays) -> Cache:
        dtype = self.model.embedder.input_embedding.dtype
        return cache_from_numpy(self.config, arrays, dtype, self._device)

    def _prepare(self) -> _Prepared:
        """The steps of the model, which may have taken the place of another."""
        if self._prepared is None or self._prepared.model is not self.model:
            step = self.model
            if self._jit_compile:
                keep_values(step)
                step = torch.compile(step, dynamic=False)
            self._prepared = _Prepared(self.model, step, {})
        return self._prepared

    @property
    def _device(self) -> torch.device:
        return self.model.embedder.input_embedding.device
