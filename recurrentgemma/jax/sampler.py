"""Sampling text from a Griffin model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece as spm
from flax.typing import Dtype
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from recurrentgemma.common.generation.loop import Request
from recurrentgemma.common.generation.output import SamplerOutput
from recurrentgemma.common.generation.sampler import BaseSampler
from recurrentgemma.common.model.layer_spec import layer_spec, require_match
from recurrentgemma.common.model.params import shapes_of
from recurrentgemma.common.model.state import Arrays, State
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma.jax.cache import Cache, cache_from_numpy, cache_to_numpy
from recurrentgemma.jax.griffin import Griffin, Params
from recurrentgemma.jax.runtime.compiler import platform_of
from recurrentgemma.jax.runtime.decode import compiled, functions
from recurrentgemma.jax.sampling import Choice, Sampling, choose

__all__ = ["Sampler", "SamplerOutput"]


class Sampler(BaseSampler[Array]):
    """Text from a model; call it, or iterate over `stream`.

    Attributes:
      model: The model.
    """

    _buckets = True

    def __init__(
        self,
        model: Griffin,
        vocab: spm.SentencePieceProcessor | Tokenizer,
        params: Params,
        jit_compile: bool = True,
        deterministic_sampling: bool = True,
        is_it_model: bool = False,
        *,
        sampling: Sampling | None = None,
    ) -> None:
        """Prepares to sample.

        Args:
          model: The model.
          vocab: Its vocabulary.
          params: Its parameters, with or without a `params` level; NumPy's go to the device once.
          jit_compile: Whether to compile; False helps with debugging.
          deterministic_sampling: Whether to take the most likely token, else draw one; `sampling`
            says more.
          is_it_model: Whether the model is instruction-tuned: prompts are put into the chat
            template, and `<end_of_turn>` ends a row.
          sampling: How tokens are chosen.

        Raises:
          ValueError: The parameters do not match the model's config; every difference is named. Or
            the model is instruction-tuned and its vocabulary has no `<end_of_turn>`.
        """
        super().__init__(model.config, vocab, sampling, deterministic_sampling, is_it_model)
        self.model = model
        self._jit_compile = jit_compile
        self.params = params

    @property
    def params(self) -> Params:
        """The parameters; assign others, trained ones say, to sample from those."""
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        params = params.get("params", params)
        expected = {spec.path: spec.shape for spec in layer_spec(self.config)}
        require_match(expected, shapes_of(params))
        if not all(isinstance(leaf, Array) for leaf in jax.tree.leaves(params)):
            params = jax.tree.map(jnp.asarray, params)
        self._params = params
        self._functions = functions(self.model)
        if self._jit_compile:
            self._functions = compiled(self.model, platform_of(self._params))
        self._ready: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled steps, which are looked up again."""
        return {name: value for name, value in vars(self).items() if name != "_functions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.params = self._params

    def _read(self, state: State) -> tuple[Cache, np.ndarray, np.ndarray]:
        if self._jit_compile:
            self._compile_prefill(state.num_rows)
        return super()._read(state)

    def _compile_prefill(self, num_rows: int) -> None:
        """Compiles every length of chunk at the first prompt, so that no later prompt has to."""
        if num_rows in self._ready:
            return
        cache = self._empty_cache(num_rows)
        for length in self.prefill_chunks:
            place = np.zeros((num_rows, length), np.int32)
            prefill: Any = self._functions.prefill  # compiled
            prefill.lower(self.params, cache, place, place).compile()
        self._ready.add(num_rows)

    def _empty_cache(self, num_rows: int) -> Cache:
        return jax.device_put(
            self.model.init_cache(num_rows, self._compute_dtype()), self._placement()
        )

    def _placement(self) -> jax.sharding.Sharding:
        """Where a state goes: with the parameters, so that all steps find it where one left it."""
        sharding = jax.tree.leaves(self.params)[0].sharding
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
        return sharding

    def _compute_dtype(self) -> Dtype:
        return self.model.dtype or jnp.result_type(*jax.tree.leaves(self.params))

    def _begin(self, state: State) -> Cache:
        if state.cache is None:
            return self._empty_cache(state.num_rows)
        return self._take(state.cache, np.arange(state.num_rows))

    def _prefill(self, cache: Cache, tokens: np.ndarray, segment_pos: np.ndarray) -> Cache:
        return self._functions.prefill(self.params, cache, tokens, segment_pos)

    def _run(self, cache: Cache) -> Cache:
        return cache

    def _feed(self, run: Cache, tokens: np.ndarray, segment_pos: np.ndarray) -> tuple[Array, Cache]:
        return self._functions.feed(self.params, run, tokens, segment_pos)

    def _score(
        self, cache: Cache, tokens: np.ndarray, segment_pos: np.ndarray, targets: np.ndarray
    ) -> tuple[Array, Array, Cache]:
        return self._functions.score(self.params, cache, tokens, segment_pos, targets)

    def _choose(
        self,
        request: Request,
        logits: Array,
        number: np.ndarray,
        seen: Array | None,
        fed: np.ndarray,
    ) -> tuple[Choice, Array | None]:
        function = _compiled_choose if self._jit_compile else _choose
        return function(request.sampling, logits, number, seen, fed, request.num_logprobs)

    def _snapshot(self, run: Cache) -> Cache:
        return self._take(run, np.arange(len(next(iter(run.values()))[0])))

    def _take(self, cache: Cache, rows: np.ndarray) -> Cache:
        return self._functions.take(cache, rows)

    def _on_device(self, values: np.ndarray) -> Array:
        return jax.device_put(values, self._placement())

    def _on_host(self, values: Array) -> np.ndarray:
        return np.asarray(values)

    def _is_own(self, value: Any) -> bool:
        return isinstance(value, Array)

    def _to_numpy(self, cache: Cache) -> Arrays:
        return cache_to_numpy(cache)

    def _from_numpy(self, arrays: Arrays) -> Cache:
        cache = cache_from_numpy(self.config, arrays, self._compute_dtype())
        return jax.device_put(cache, self._placement())

    def _seed(self, rng: Any) -> Any:
        if rng is None:
            return np.random.SeedSequence().entropy
        return _as_seeds(rng)


def _as_seeds(rng: Any) -> Any:
    """Keys, alone or several, as the integers of their bits; anything else as it is."""
    if isinstance(rng, list | tuple) or (_is_key(rng) and rng.ndim):
        return [_as_seeds(key) for key in rng]
    if _is_key(rng):
        rng = jax.random.key_data(rng)
    elif not isinstance(rng, Array) or rng.dtype != jnp.uint32 or rng.shape != _old_key().shape:
        return rng
    return int.from_bytes(np.asarray(rng).tobytes(), "little")


def _is_key(rng: Any) -> bool:
    return isinstance(rng, Array) and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)


def _old_key() -> jax.ShapeDtypeStruct:
    """What `jax.random.PRNGKey` gives: an array of integers as any other."""
    return jax.eval_shape(jax.random.PRNGKey, 0)


def _choose(
    sampling: Sampling,
    logits: Array,
    number: Array | np.ndarray,
    seen: Array | None,
    fed: Array | np.ndarray,
    num_logprobs: int | None,
) -> tuple[Choice, Array | None]:
    if seen is not None:
        seen = seen.at[jnp.arange(len(fed)), fed].set(True)
    return choose(sampling, logits, jnp.asarray(number), seen, num_logprobs), seen


_compiled_choose = jax.jit(
    _choose, static_argnames=("sampling", "num_logprobs"), donate_argnames=("seen",)
)
