"""A model as an engine of text generation: compiled steps, which change a state in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from recurrentgemma.common.generation.engine import Engine, LogProbs, Sampled
from recurrentgemma.common.generation.settings import RowSettings, Variant
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import layer_spec, require_match
from recurrentgemma.common.model.params import shapes_of
from recurrentgemma.common.model.state import Arrays
from recurrentgemma.jax.cache import Cache, cache_from_numpy, cache_to_numpy
from recurrentgemma.jax.model import Model
from recurrentgemma.jax.quantization import dtype_of
from recurrentgemma.jax.runtime.compiler import platform_of
from recurrentgemma.jax.runtime.decode import compiled, functions, watched
from recurrentgemma.jax.runtime.params import laid_out
from recurrentgemma.jax.runtime.stored import num_bytes, stored
from recurrentgemma.jax.runtime.trees import Params
from recurrentgemma.jax.sharding import state_shardings

# With more bytes of parameters a step takes so long on a CPU that its call hardly counts, and a
# burst would hold back tokens that someone waits for.
_QUICK_BYTES = 2**27


class ModelEngine(Engine):
    """The `Engine` of a model and its parameters.

    Attributes:
      model: The model.
    """

    pads_chunks = True

    def __init__(self, model: Model, params: Params, jit_compile: bool = True) -> None:
        """Prepares the steps.

        Args:
          model: The model.
          params: Its parameters, with or without a `params` level; NumPy arrays go to the device
            once.
          jit_compile: Whether to compile; False helps with debugging.

        Raises:
          ValueError: The parameters do not match the model's config; every difference is named.
        """
        self.model = model
        self._jit_compile = jit_compile
        self.params = params
        on_cpu = platform_of(self._params) == "cpu"
        self.burst = 1 if on_cpu else 8
        self.long_burst = 16 if on_cpu and self.num_bytes <= _QUICK_BYTES else 1

    def __getstate__(self) -> dict[str, Any]:
        """Without what the setter of `params` makes again."""
        made = ("_functions", "_stored")
        return {name: value for name, value in vars(self).items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.params = self._params

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def dtype(self) -> str:
        return jnp.dtype(self._compute_dtype()).name

    @property
    def num_bytes(self) -> int:
        return num_bytes(self._stored)

    @property
    def params(self) -> Params:
        """The parameters."""
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        params = params.get("params", params)
        expected = {spec.path: spec.shape for spec in layer_spec(self.config)}
        require_match(expected, shapes_of(params))
        params = laid_out(self.model, params)
        if not all(isinstance(leaf, Array) for leaf in jax.tree.leaves(params)):
            params = jax.tree.map(jnp.asarray, params)
        self._params = params
        self._stored = stored(self.config, params)
        self._functions = functions(self.model)
        if self._jit_compile:
            self._functions = compiled(self.model, platform_of(params))
        self._ready: set[Any] = set()

    def prepare(
        self, num_rows: int, capacity: int | None = None, lengths: Sequence[int] | None = None
    ) -> None:
        lengths = tuple(self.prefill_chunks if lengths is None else lengths)
        if (num_rows, capacity, lengths) in self._ready or not self._jit_compile:
            return
        cache = self.begin(num_rows, capacity)
        for length in lengths:
            place = np.zeros((num_rows, length), np.int32)
            prefill: Any = self._functions.prefill  # compiled
            prefill.lower(self._stored, cache, place, place).compile()
        self._ready.add((num_rows, capacity, lengths))

    def begin(self, num_rows: int, capacity: int | None = None) -> Cache:
        cache = self.model.init_cache(num_rows, self._compute_dtype(), capacity)
        return self._placed(cache, num_rows)

    def prefill(self, cache: Cache, tokens: np.ndarray, segment_pos: np.ndarray) -> Cache:
        return self._functions.prefill(self._stored, cache, tokens, segment_pos)

    def score(
        self, cache: Cache, tokens: np.ndarray, segment_pos: np.ndarray, targets: np.ndarray
    ) -> tuple[Array, Array, Cache]:
        return self._functions.score(self._stored, cache, tokens, segment_pos, targets)

    def feed(self, cache: Cache, tokens: Any, segment_pos: Any) -> tuple[Array, Cache]:
        return self._functions.feed(self._stored, cache, tokens, segment_pos)

    def choose(
        self,
        variant: Variant,
        settings: RowSettings,
        logits: Array,
        numbers: Any,
        seen: Array | None,
    ) -> tuple[Sampled, Array | None]:
        return self._functions.choose(variant, settings, logits, numbers, seen)

    def decode(
        self,
        variant: Variant,
        settings: RowSettings,
        cache: Cache,
        seen: Array | None,
        tokens: np.ndarray,
        segment_pos: np.ndarray,
        left: np.ndarray,
        numbers: np.ndarray,
    ) -> tuple[Sampled, Cache, Array | None]:
        if len(numbers) > 1:
            return self._functions.burst(
                variant, self._stored, settings, cache, seen, tokens, segment_pos, left, numbers
            )
        # One step is two programs: a variant that comes first compiles the choice alone.
        logits, cache = self.feed(cache, tokens, segment_pos)
        variant_ = variant._replace(logits=False)
        sampled, seen = self.choose(variant_, settings, logits, numbers[0], seen)
        logprobs = sampled.logprobs and LogProbs(*(np.asarray(z)[None] for z in sampled.logprobs))
        logits = logits[None] if variant.logits else None
        return Sampled(np.asarray(sampled.tokens)[None], logprobs, logits), cache, seen

    def watch(
        self, cache: Cache, tokens: np.ndarray, segment_pos: np.ndarray
    ) -> tuple[dict[str, bool], Cache]:
        finite, cache = self._functions.watch(self._stored, cache, tokens, segment_pos)
        return dict(zip(watched(self.model), np.asarray(finite).tolist(), strict=True)), cache

    def take(self, cache: Any, rows: np.ndarray) -> Any:
        return self._functions.take(cache, rows)

    def put(self, cache: Any, rows: np.ndarray, others: Any) -> Any:
        return self._functions.put(cache, rows, others)

    def padded(self, values: Array, axis: int, count: int) -> Array:
        return jnp.pad(values, [(0, count * (place == axis)) for place in range(values.ndim)])

    def on_device(self, values: Any) -> Any:
        return jax.device_put(values, self._placement())

    def on_host(self, values: Any) -> np.ndarray:
        return np.asarray(values)

    def owns(self, cache: Any) -> bool:
        return all(isinstance(value, Array) for block in cache.values() for value in block)

    def to_numpy(self, cache: Cache) -> Arrays:
        return cache_to_numpy(cache)

    def from_numpy(self, arrays: Arrays) -> Cache:
        cache = cache_from_numpy(self.config, arrays, self._compute_dtype())
        return self._placed(cache, len(next(iter(arrays.values()))))

    def _placed(self, cache: Cache, rows: int) -> Cache:
        """A state where each step leaves it: beside the parameters."""
        if self.model.mesh is None:
            return jax.device_put(cache, self._placement())
        return jax.device_put(cache, state_shardings(self.config, self.model.mesh, rows))

    def _placement(self) -> jax.sharding.Sharding:
        """Where values go: beside the parameters."""
        sharding = jax.tree.leaves(self.params)[0].sharding
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
        return sharding

    def _compute_dtype(self) -> Dtype:
        return self.model.dtype or dtype_of(self.params)
