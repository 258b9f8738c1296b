"""The calls that behaviour tests make on both twins."""

from __future__ import annotations

import abc
import functools
import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.mixers import MIXERS
from recurrentgemma.common.twin import Twin, find_twin

Params = Mapping[str, np.ndarray]


def wide_dtype(dtype: str) -> str:
    """The dtype of a recurrent state."""
    return "float32" if dtype == "bfloat16" else dtype


class Network(abc.ABC):
    """A module with its parameters."""

    @abc.abstractmethod
    def __call__(
        self, x: np.ndarray, segment_pos: np.ndarray | None = None, state: Any = None
    ) -> tuple[np.ndarray, Any]:
        """Outputs (a Griffin's are the logits of tokens `x`) and the new state, if any."""

    @abc.abstractmethod
    def grads(
        self,
        x: np.ndarray,
        segment_pos: np.ndarray | None = None,
        state: Any = None,
        *,
        dy: np.ndarray,
        dstate: Any = None,
    ) -> dict[str, Any]:
        """Gradients of sum(dy * outputs) + sum(dstate * new state).

        Under "params" by path in the Flax layout, under "x" unless the input is tokens, and under
        "state" unless that is None, without its integers.
        """


class Backend(abc.ABC):
    """A twin and its modules."""

    name: str
    device: str | None = None

    @functools.cached_property
    def twin(self) -> Twin:
        return find_twin(self.name)

    @functools.cached_property
    def module(self) -> Any:
        """The twin's package."""
        return importlib.import_module(f"recurrentgemma.{self.name}")

    def precision(self, dtype: str):
        """See `Twin.precision`."""
        return self.twin.precision(dtype)

    def array(self, value: np.ndarray, dtype: str) -> Any:
        """An array of the framework."""
        return self.twin.from_numpy(np.asarray(value), dtype, self.device)

    def griffin(
        self,
        config: Config,
        params: Params,
        dtype: str = "float64",
        gradient_checkpointing: bool = False,
    ) -> Network:
        """A model with these parameters, by the layer spec's paths."""
        kwargs = {"gradient_checkpointing": gradient_checkpointing}
        return self._network("Griffin", (config,), params, dtype, kwargs)

    def block(
        self, kind: str, config: GriffinConfig, prefix: str, params: Params, dtype: str = "float64"
    ) -> Network:
        """A layer or block of the model with its share of these parameters."""
        below = {
            path.removeprefix(f"{prefix}."): value
            for path, value in params.items()
            if path.startswith(f"{prefix}.")
        }
        return self._network(kind, sizes(kind, config, prefix), below, dtype, {})

    def state(self, array_state: Any, dtype: str, kind: str = "") -> Any:
        """A NumPy state as the twin takes it; `kind` is the module that it belongs to."""
        if array_state is None:
            return None
        if not isinstance(array_state, Mapping):
            return self.array(array_state, self._state_dtype(kind, array_state, dtype))
        fields = tuple(array_state)
        for mixer in MIXERS.values():
            if fields == mixer.cache._fields:  # pyright: ignore[reportAttributeAccessIssue]
                pairs = array_state.items()
                return mixer.cache(
                    *(self.array(v, self._state_dtype(f, v, dtype)) for f, v in pairs)
                )
        return {block: self.state(fields, dtype) for block, fields in array_state.items()}

    def to_numpy(self, value: Any) -> Any:
        """Arrays of the framework, at any depth, as float64 and int32; named tuples as dicts."""
        if value is None:
            return None
        if isinstance(value, Mapping):
            return {key: self.to_numpy(part) for key, part in value.items()}
        if hasattr(value, "_asdict"):
            return self.to_numpy(value._asdict())
        if isinstance(value, tuple | list):
            return tuple(self.to_numpy(part) for part in value)
        array = self.twin.to_numpy(value)
        return array.astype(np.float64) if array.dtype.kind in "fV" else array  # V is bfloat16

    def scan_arguments(self, x, a, h0, reset, dtype: str) -> tuple[Any, Any, Any, Any]:
        """Arrays for a linear scan, the state wide; None stays None."""
        return (
            self.array(x, dtype),
            self.array(a, dtype),
            None if h0 is None else self.array(h0, wide_dtype(dtype)),
            None if reset is None else self.array(reset, "bool"),
        )

    def rg_lru_arguments(
        self, x, input_gate, a_gate, a_param, segment_pos, h0, dtype: str
    ) -> tuple[Any, ...]:
        """Arrays for an RG-LRU scan: the state wide, or None."""
        return (
            *(self.array(value, dtype) for value in (x, input_gate, a_gate, a_param)),
            self.array(segment_pos, "int32"),
            None if h0 is None else self.array(h0, wide_dtype(dtype)),
        )

    @staticmethod
    def _state_dtype(field: str, value: np.ndarray, dtype: str) -> str:
        if np.asarray(value).dtype.kind in "iu":
            return "int32"
        return wide_dtype(dtype) if field in ("rg_lru_state", "RGLRU") else dtype

    @abc.abstractmethod
    def _network(
        self,
        kind: str,
        arguments: tuple[Any, ...],
        params: Params,
        dtype: str,
        kwargs: dict[str, Any],
    ) -> Network: ...

    @abc.abstractmethod
    def raw_griffin(
        self, config: Config, params: Params, dtype: str = "float32"
    ) -> tuple[Any, Any]:
        """The twin's own model, and a function that calls it: f(tokens, segment_pos, cache)."""

    def init_params(self, config: Config, seed: int, dtype: str = "float32") -> Params:
        """Initial parameters from a seed, by path in the Flax layout, in their own dtype."""
        return self.twin.params(self.twin.init(config, seed, dtype))

    def sampler(self, config: Config, params: Params, vocab: Any, **kwargs: Any) -> Any:
        """A sampler on a float32 model with these parameters."""
        return self.twin.sampler(self.twin.make(config, params.items(), "float32"), vocab, **kwargs)

    @abc.abstractmethod
    def linear_scan(
        self,
        x: np.ndarray,
        a: np.ndarray,
        h0: np.ndarray | None = None,
        reset: np.ndarray | None = None,
        *,
        dtype: str = "float64",
        **kwargs: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """All states and the last."""

    @abc.abstractmethod
    def linear_scan_vjp(
        self,
        x: np.ndarray,
        a: np.ndarray,
        h0: np.ndarray,
        reset: np.ndarray | None,
        *,
        dy: np.ndarray,
        dlast: np.ndarray,
        dtype: str = "float64",
        **kwargs: Any,
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """States and the last; gradients of sum(dy * states) + sum(dlast * last) for x, a, h0."""

    @abc.abstractmethod
    def rg_lru_scan(
        self,
        x: np.ndarray,
        input_gate: np.ndarray,
        a_gate: np.ndarray,
        a_param: np.ndarray,
        segment_pos: np.ndarray,
        h0: np.ndarray | None = None,
        *,
        dtype: str = "float64",
        **kwargs: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """All states and the last."""

    @abc.abstractmethod
    def rg_lru_scan_vjp(
        self,
        x: np.ndarray,
        input_gate: np.ndarray,
        a_gate: np.ndarray,
        a_param: np.ndarray,
        segment_pos: np.ndarray,
        h0: np.ndarray,
        *,
        dy: np.ndarray,
        dlast: np.ndarray,
        dtype: str = "float64",
        **kwargs: Any,
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """States and the last; gradients of sum(dy * states) + sum(dlast * last).

        For x, input_gate, a_gate, a_param and h0.
        """

    @abc.abstractmethod
    def rg_lru_scan_second_vjp(
        self,
        x: np.ndarray,
        input_gate: np.ndarray,
        a_gate: np.ndarray,
        a_param: np.ndarray,
        segment_pos: np.ndarray,
        h0: np.ndarray,
        *,
        dy: np.ndarray,
        dlast: np.ndarray,
        directions: tuple[np.ndarray, ...],
        **kwargs: Any,
    ) -> tuple[np.ndarray, ...]:
        """Gradients of the sum over all of `directions` times those that `rg_lru_scan_vjp` gives.

        In float64.
        """

    def implementations(self) -> list[str]:
        """The implementations of the recurrence that run on this machine, interpreted or not."""
        return list(importlib.import_module(f"recurrentgemma.{self.name}.scan").IMPLEMENTATIONS)

    def widest(self, implementation: str) -> str:
        """The widest dtype that an implementation computes in."""
        del implementation
        return "float64"


def sizes(kind: str, c: GriffinConfig, prefix: str) -> tuple[Any, ...]:
    """The published arguments of a layer or block of the model."""
    if kind == "ResidualBlock":
        block_type = c.block_types[int(prefix.removeprefix("blocks."))]
        window = c.attention_window_size
        return c.width, c.mlp_expanded_width, c.num_heads, window, block_type, c.lru_width
    return {
        "RMSNorm": (c.width,),
        "BlockDiagonalLinear": (c.lru_width, c.num_heads),
        "Conv1D": (c.lru_width, 4),
        "RGLRU": (c.lru_width, c.num_heads),
        "RecurrentBlock": (c.width, c.num_heads, c.lru_width),
        "LocalAttentionBlock": (c.width, c.num_heads, c.attention_window_size),
        "MLPBlock": (c.width, c.mlp_expanded_width),
    }[kind]


def input_dtype(x: np.ndarray, dtype: str) -> str:
    return "int32" if x.dtype.kind in "iu" else dtype


def position_dtype(segment_pos: np.ndarray) -> str:
    """NumPy's default integers become int32; other dtypes stay."""
    return "int32" if segment_pos.dtype == np.int64 else segment_pos.dtype.name


def float_leaves(state: Any) -> list[np.ndarray]:
    """The float arrays of a NumPy state in the order of its own mappings."""
    if state is None:
        return []
    if isinstance(state, Mapping):
        return [leaf for part in state.values() for leaf in float_leaves(part)]
    return [state] if np.asarray(state).dtype.kind == "f" else []


def named_grads(
    params: dict[str, np.ndarray], x: np.ndarray, state: Any, inputs: list[np.ndarray]
) -> dict[str, Any]:
    """Gradients of the float inputs put back under the names of x and the state's arrays."""
    remaining = iter(inputs)

    def restore(part: Any) -> Any:
        if isinstance(part, Mapping):
            restored = {key: restore(value) for key, value in part.items()}
            return {key: value for key, value in restored.items() if value is not None}
        return next(remaining) if np.asarray(part).dtype.kind == "f" else None

    named: dict[str, Any] = {"params": {path: params[path] for path in sorted(params)}}
    if x.dtype.kind == "f":
        named["x"] = next(remaining)
    if state is not None:
        named["state"] = restore(state)
    assert next(remaining, None) is None
    return named
