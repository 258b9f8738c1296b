"""One adapter per twin: the same methods over NumPy, so that a behaviour test is written once.

Arrays go in as float64 and int32 and come out so; in between they have the dtype asked for. States
are what `common.reference` takes and returns: mappings of arrays, "blocks.N" of a field.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from recurrentgemma.common.config import GriffinConfig
from recurrentgemma.common.layer_spec import layer_spec, spec_by_path

TWINS = ("jax", "torch")
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
        """Outputs (of a Griffin, logits of tokens `x`) and the new state, None where none is."""

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

        Under "params" by path in the Flax layout, under "x" (unless tokens), and under "state"
        (unless None; without its integers).
        """


class Backend(abc.ABC):
    """A twin."""

    name: str
    module: Any

    def griffin(
        self,
        config: GriffinConfig,
        params: Params,
        dtype: str = "float64",
        gradient_checkpointing: bool = False,
    ) -> Network:
        """A model with these parameters, by the layer spec's paths."""
        kwargs = {"gradient_checkpointing": gradient_checkpointing}
        return self._network("Griffin", config, "", params, dtype, kwargs)

    def block(
        self, kind: str, config: GriffinConfig, prefix: str, params: Params, dtype: str = "float64"
    ) -> Network:
        """A layer or block of the model with its share of these parameters."""
        below = {
            path.removeprefix(f"{prefix}."): value
            for path, value in params.items()
            if path.startswith(f"{prefix}.")
        }
        return self._network(kind, config, prefix, below, dtype, {})

    def state(self, array_state: Any, dtype: str, kind: str = "") -> Any:
        """A NumPy state as the twin takes it; `kind` is the module that it is of."""
        if array_state is None:
            return None
        if not isinstance(array_state, Mapping):
            return self.array(array_state, self._state_dtype(kind, array_state, dtype))
        if "keys" in array_state or "rg_lru_state" in array_state:
            name = "AttentionBlockCache" if "keys" in array_state else "RecurrentBlockCache"
            fields = {
                field: self.array(value, self._state_dtype(field, value, dtype))
                for field, value in array_state.items()
            }
            return getattr(self.module, name)(**fields)
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
        array = self._numpy(value)
        return array.astype(np.float64) if array.dtype.kind == "f" else array

    def scan_arguments(self, x, a, h0, reset, dtype: str) -> tuple[Any, Any, Any, Any]:
        """Arrays for a linear scan: the state wide, what is None still None."""
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
    def precision(self, dtype: str) -> contextlib.AbstractContextManager[Any]:
        """Where arrays of this dtype can be made."""

    @abc.abstractmethod
    def array(self, value: np.ndarray, dtype: str) -> Any:
        """An array of the framework."""

    @abc.abstractmethod
    def _numpy(self, value: Any) -> np.ndarray: ...

    @abc.abstractmethod
    def _network(
        self,
        kind: str,
        config: GriffinConfig,
        prefix: str,
        params: Params,
        dtype: str,
        kwargs: dict[str, Any],
    ) -> Network: ...

    @abc.abstractmethod
    def raw_griffin(
        self, config: GriffinConfig, params: Params, dtype: str = "float32"
    ) -> tuple[Any, Any]:
        """The twin's own model, and what calls it: f(tokens, segment_pos, cache)."""

    @abc.abstractmethod
    def init_params(self, config: GriffinConfig, seed: int, dtype: str = "float32") -> Params:
        """Initial parameters from a seed, by path in the Flax layout, in their own dtype."""

    @abc.abstractmethod
    def sampler(self, config: GriffinConfig, params: Params, vocab: Any, **kwargs: Any) -> Any:
        """A sampler on a float32 model with these parameters."""

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

    def implementations(self) -> list[str]:
        """Of the recurrences: those that run on this machine, interpreted or not."""
        return list(importlib.import_module(f"recurrentgemma.{self.name}.scan").IMPLEMENTATIONS)

    def widest(self, implementation: str) -> str:
        """The widest dtype that an implementation computes in."""
        del implementation
        return "float64"


# --------------------------------------------------------------------------------------------- JAX


class JaxBackend(Backend):
    name = "jax"

    @functools.cached_property
    def module(self) -> Any:
        return importlib.import_module("recurrentgemma.jax")

    def precision(self, dtype: str):
        import jax

        return jax.enable_x64(dtype == "float64")

    def array(self, value: np.ndarray, dtype: str) -> Any:
        import jax.numpy as jnp

        return jnp.asarray(value, dtype)

    def _numpy(self, value: Any) -> np.ndarray:
        import jax.numpy as jnp

        return np.asarray(value.astype(jnp.float32) if value.dtype == jnp.bfloat16 else value)

    def _network(self, kind, config, prefix, params, dtype, kwargs) -> JaxNetwork:
        if kind != "Griffin":
            kwargs = {"prefix": prefix}
        module = getattr(self.module, kind)(config, param_dtype=dtype, **kwargs)
        return JaxNetwork(self, kind, module, self._tree(params, dtype), dtype)

    def _tree(self, params: Params, dtype: str) -> dict[str, Any]:
        griffin = importlib.import_module("recurrentgemma.jax.griffin")
        tree: dict[str, Any] = {}
        with self.precision(dtype):
            for path, value in params.items():
                griffin.set_path(tree, path, self.array(value, dtype))
        return tree

    def raw_griffin(self, config, params, dtype="float32"):
        model = self.module.Griffin(config, param_dtype=dtype)
        tree = self._tree(params, dtype)
        return model, functools.partial(_jax_functions()[0], model, tree)

    def init_params(self, config, seed, dtype="float32"):
        griffin = importlib.import_module("recurrentgemma.jax.griffin")
        tree = self.module.init_params(config, seed, dtype)
        return {
            spec.path: np.asarray(griffin.get_path(tree, spec.path)) for spec in layer_spec(config)
        }

    def sampler(self, config, params, vocab, **kwargs):
        model = self.module.Griffin(config)
        return self.module.Sampler(model, vocab, self._tree(params, "float32"), **kwargs)

    def implementations(self):
        names = super().implementations()
        # Of the Pallas kernels each target's, interpreted.
        return [name for name in names if name != "pallas"] + (
            [f"pallas-{target}" for target in PALLAS_TARGETS] if "pallas" in names else []
        )

    def widest(self, implementation):
        return "float32" if implementation.startswith("pallas") else "float64"

    def linear_scan(self, x, a, h0=None, reset=None, *, dtype="float64", **kwargs):
        with self.precision(dtype):
            args = self.scan_arguments(x, a, h0, reset, dtype)
            return self.to_numpy(_jax_functions()[2](*args, **kwargs))

    def linear_scan_vjp(self, x, a, h0, reset, *, dy, dlast, dtype="float64", **kwargs):
        with self.precision(dtype):
            args = self.scan_arguments(x, a, h0, reset, dtype)
            cotangents = self.array(dy, dtype), self.array(dlast, wide_dtype(dtype))
            return self.to_numpy(_jax_functions()[3](*args, cotangents, **kwargs))

    def rg_lru_scan(
        self, x, input_gate, a_gate, a_param, segment_pos, h0=None, *, dtype="float64", **kwargs
    ):
        with self.precision(dtype):
            args = self.rg_lru_arguments(x, input_gate, a_gate, a_param, segment_pos, h0, dtype)
            return self.to_numpy(_jax_functions()[4](*args, **kwargs))

    def rg_lru_scan_vjp(
        self,
        x,
        input_gate,
        a_gate,
        a_param,
        segment_pos,
        h0,
        *,
        dy,
        dlast,
        dtype="float64",
        **kwargs,
    ):
        with self.precision(dtype):
            args = self.rg_lru_arguments(x, input_gate, a_gate, a_param, segment_pos, h0, dtype)
            cotangents = self.array(dy, dtype), self.array(dlast, wide_dtype(dtype))
            return self.to_numpy(_jax_functions()[5](*args, cotangents, **kwargs))


PALLAS_TARGETS = ("tpu", "gpu")


@contextlib.contextmanager
def jax_implementation(label: str = "auto"):
    """Where an implementation can be traced; yields the package's name for it.

    The label of a Pallas kernel has its target. It is interpreted on the CPU: a TPU's with memory
    poisoned and a search for races.
    """
    name, _, target = label.partition("-")
    if not target:
        yield name
        return
    from jax.experimental.pallas import tpu as pltpu

    from recurrentgemma.jax.scan import pallas_target

    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pallas_target(target, interpret=params if target == "tpu" else True):
        yield name


@functools.cache
def _jax_functions():
    """Compiled once a shape, whichever test asks.

    Apply, gradients; a scan, with gradients; an RG-LRU scan, with gradients.
    """
    import jax
    import jax.numpy as jnp

    from recurrentgemma.jax import linear_scan, rg_lru_scan

    def is_float(leaf) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating)

    @functools.partial(jax.jit, static_argnums=0)
    def apply(module, params, *args):
        return module.apply({"params": params}, *args)

    @functools.partial(jax.jit, static_argnums=0)
    def grads(module, params, args, cotangents):
        leaves, structure = jax.tree.flatten(args)

        def loss(params, floats):
            floats = iter(floats)
            merged = [next(floats) if is_float(leaf) else leaf for leaf in leaves]
            outputs = module.apply({"params": params}, *jax.tree.unflatten(structure, merged))
            outputs = [leaf for leaf in jax.tree.leaves(outputs) if is_float(leaf)]
            pairs = zip(outputs, cotangents, strict=True)
            return sum(jnp.vdot(out.astype(c.dtype), c) for out, c in pairs)

        return jax.grad(loss, (0, 1))(params, [leaf for leaf in leaves if is_float(leaf)])

    @functools.partial(jax.jit, static_argnames=("reverse", "implementation"))
    def scan(*args, implementation="auto", **kwargs):
        with jax_implementation(implementation) as name:
            return linear_scan(*args, implementation=name, **kwargs)

    @functools.partial(jax.jit, static_argnames=("reverse", "implementation"))
    def scan_vjp(x, a, h0, reset, cotangents, **kwargs):
        def run(x, a, h0):
            return scan(x, a, h0, reset, **kwargs)

        outputs, pullback = jax.vjp(run, x, a, h0)
        return outputs, pullback(cotangents)

    @functools.partial(jax.jit, static_argnames="implementation")
    def rg_lru(*args, implementation="auto"):
        with jax_implementation(implementation) as name:
            return rg_lru_scan(*args, implementation=name)

    @functools.partial(jax.jit, static_argnames="implementation")
    def rg_lru_vjp(x, input_gate, a_gate, a_param, segment_pos, h0, cotangents, **kwargs):
        def run(x, input_gate, a_gate, a_param, h0):
            return rg_lru(x, input_gate, a_gate, a_param, segment_pos, h0, **kwargs)

        outputs, pullback = jax.vjp(run, x, input_gate, a_gate, a_param, h0)
        return outputs, pullback(cotangents)

    return apply, grads, scan, scan_vjp, rg_lru, rg_lru_vjp


class JaxNetwork(Network):
    def __init__(self, backend: JaxBackend, kind: str, module, params, dtype: str) -> None:
        self.backend, self.kind, self.module, self.dtype = backend, kind, module, dtype
        self.params = params

    def _arguments(self, x, segment_pos, state) -> tuple:
        # A whole number of arguments: those that some modules do not take are left out.
        arguments: list[Any] = [self.backend.array(x, _input_dtype(x, self.dtype))]
        if segment_pos is not None:
            arguments.append(self.backend.array(segment_pos, "int32"))
            arguments.append(self.backend.state(state, self.dtype, self.kind))
        return tuple(arguments)

    def __call__(self, x, segment_pos=None, state=None):
        with self.backend.precision(self.dtype):
            arguments = self._arguments(x, segment_pos, state)
            outputs = _jax_functions()[0](self.module, self.params, *arguments)
            outputs = self.backend.to_numpy(outputs)
        return outputs if segment_pos is not None else (outputs, None)

    def grads(self, x, segment_pos=None, state=None, *, dy, dstate=None):
        import jax

        with self.backend.precision(self.dtype):
            arguments = self._arguments(x, segment_pos, state)
            wide = wide_dtype(self.dtype)
            cotangents = [self.backend.array(c, wide) for c in [dy, *_float_leaves(dstate)]]
            params, floats = _jax_functions()[1](self.module, self.params, arguments, cotangents)
            floats = [self.backend.to_numpy(leaf) for leaf in floats]
            flat = {
                path: self.backend.to_numpy(leaf)
                for path, leaf in zip(_paths(self.params), jax.tree.leaves(params), strict=True)
            }
        return _named_grads(flat, x, state, floats)


def _paths(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Paths of a tree's leaves in JAX's order."""
    paths = []
    for key in sorted(tree):
        value = tree[key]
        below = isinstance(value, Mapping)
        paths += _paths(value, f"{prefix}{key}.") if below else [prefix + key]
    return paths


# ----------------------------------------------------------------------------------------- PyTorch


class TorchBackend(Backend):
    name = "torch"

    @functools.cached_property
    def module(self) -> Any:
        return importlib.import_module("recurrentgemma.torch")

    device = "cpu"

    def precision(self, dtype: str):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def running(self, implementation: str = "auto", **_: Any):
        """Where a recurrence runs: Triton's kernels on a GPU unless they are interpreted."""
        compiled = implementation == "triton" and os.environ["TRITON_INTERPRET"] == "0"
        self.device = "cuda" if compiled else "cpu"
        try:
            with np.errstate(over="ignore"):  # exp in an interpreted kernel
                yield
        finally:
            self.device = "cpu"

    def array(self, value: np.ndarray, dtype: str) -> Any:
        import torch

        array = torch.tensor(np.ascontiguousarray(value), device=self.device)
        return array.to(getattr(torch, dtype))

    def _numpy(self, value: Any) -> np.ndarray:
        import torch

        value = value.detach()
        return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()

    def _network(self, kind, config, prefix, params, dtype, kwargs) -> TorchNetwork:
        import torch

        positional = () if kind == "Griffin" else (prefix,)
        module = getattr(self.module, kind)(
            config, *positional, dtype=getattr(torch, dtype), **kwargs
        )
        specs, below = spec_by_path(config), f"{prefix}." if prefix else ""
        module.load_state_dict(
            {
                specs[below + path].torch.name.removeprefix(below): self.array(
                    specs[below + path].torch.encode(np.asarray(value)), dtype
                )
                for path, value in params.items()
            }
        )
        return TorchNetwork(self, kind, module, dtype)

    def raw_griffin(self, config, params, dtype="float32"):
        model = self._network("Griffin", config, "", params, dtype, {}).module
        return model, model

    def init_params(self, config, seed, dtype="float32"):
        import torch

        model = self.module.Griffin(config, dtype=getattr(torch, dtype))
        model.reset_parameters(seed)
        stored = model.state_dict()
        params = {}
        for spec in layer_spec(config):
            value = stored[spec.torch.name]
            if value.dtype == torch.bfloat16:  # bit for bit, in NumPy's extension type
                import ml_dtypes

                value = value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            params[spec.path] = np.asarray(spec.torch.decode(np.asarray(value), spec))
        return params

    def sampler(self, config, params, vocab, **kwargs):
        model = self._network("Griffin", config, "", params, "float32", {}).module
        return self.module.Sampler(model, vocab, **kwargs)

    def linear_scan(self, x, a, h0=None, reset=None, *, dtype="float64", **kwargs):
        with self.running(**kwargs):
            args = self.scan_arguments(x, a, h0, reset, dtype)
            return self.to_numpy(self.module.linear_scan(*args, **kwargs))

    def linear_scan_vjp(self, x, a, h0, reset, *, dy, dlast, dtype="float64", **kwargs):
        import torch

        with self.running(**kwargs):
            x, a, h0, reset = self.scan_arguments(x, a, h0, reset, dtype)
            inputs = [value.requires_grad_() for value in (x, a, h0)]
            outputs = self.module.linear_scan(x, a, h0, reset, **kwargs)
            cotangents = self.array(dy, dtype), self.array(dlast, wide_dtype(dtype))
            gradients = torch.autograd.grad(
                outputs, inputs, cotangents, allow_unused=True, materialize_grads=True
            )
            return self.to_numpy((outputs, gradients))

    def rg_lru_scan(
        self, x, input_gate, a_gate, a_param, segment_pos, h0=None, *, dtype="float64", **kwargs
    ):
        with self.running(**kwargs):
            args = self.rg_lru_arguments(x, input_gate, a_gate, a_param, segment_pos, h0, dtype)
            return self.to_numpy(self.module.rg_lru_scan(*args, **kwargs))

    def rg_lru_scan_vjp(
        self,
        x,
        input_gate,
        a_gate,
        a_param,
        segment_pos,
        h0,
        *,
        dy,
        dlast,
        dtype="float64",
        **kwargs,
    ):
        import torch

        with self.running(**kwargs):
            args = self.rg_lru_arguments(x, input_gate, a_gate, a_param, segment_pos, h0, dtype)
            inputs = [value.requires_grad_() for value in args if value.is_floating_point()]
            outputs = self.module.rg_lru_scan(*args, **kwargs)
            cotangents = self.array(dy, dtype), self.array(dlast, wide_dtype(dtype))
            gradients = torch.autograd.grad(
                outputs, inputs, cotangents, allow_unused=True, materialize_grads=True
            )
            return self.to_numpy((outputs, gradients))


class TorchNetwork(Network):
    def __init__(self, backend: TorchBackend, kind: str, module, dtype: str) -> None:
        self.backend, self.kind, self.module, self.dtype = backend, kind, module, dtype

    def _arguments(self, x, segment_pos, state) -> list[Any]:
        arguments: list[Any] = [self.backend.array(x, _input_dtype(x, self.dtype))]
        if segment_pos is not None:
            arguments.append(self.backend.array(segment_pos, "int32"))
            arguments.append(self.backend.state(state, self.dtype, self.kind))
        return arguments

    def __call__(self, x, segment_pos=None, state=None):
        import torch

        with torch.no_grad():
            outputs = self.module(*self._arguments(x, segment_pos, state))
        outputs = self.backend.to_numpy(outputs)
        return outputs if segment_pos is not None else (outputs, None)

    def grads(self, x, segment_pos=None, state=None, *, dy, dstate=None):
        import torch

        arguments = self._arguments(x, segment_pos, state)
        inputs = [
            leaf.requires_grad_() for leaf in _torch_leaves(arguments) if leaf.is_floating_point()
        ]
        outputs = self.module(*arguments)
        outputs = [leaf for leaf in _torch_leaves(outputs) if leaf.is_floating_point()]
        wide = wide_dtype(self.dtype)
        cotangents = [self.backend.array(c, wide) for c in [dy, *_float_leaves(dstate)]]
        pairs = zip(outputs, cotangents, strict=True)
        loss = torch.stack([(out.to(c.dtype) * c).sum() for out, c in pairs]).sum()
        names, parameters = zip(*self.module.named_parameters(), strict=True)
        gradients = torch.autograd.grad(
            loss, [*parameters, *inputs], allow_unused=True, materialize_grads=True
        )
        gradients = [self.backend.to_numpy(gradient) for gradient in gradients]
        prefix = f"{self.module.prefix}." if self.module.prefix else ""
        specs = {spec.torch.name: spec for spec in layer_spec(self.module.config)}
        flat = {}
        for name, gradient in zip(names, gradients[: len(names)], strict=True):
            spec = specs[prefix + name]
            flat[spec.path.removeprefix(prefix)] = spec.torch.decode(gradient, spec)
        return _named_grads(flat, x, state, gradients[len(names) :])


def _torch_leaves(tree: Any) -> list[Any]:
    if tree is None:
        return []
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in _torch_leaves(part)]
    if isinstance(tree, tuple | list):
        return [leaf for part in tree for leaf in _torch_leaves(part)]
    return [tree]


# ---------------------------------------------------------------------------------------- for both


def _input_dtype(x: np.ndarray, dtype: str) -> str:
    return "int32" if x.dtype.kind in "iu" else dtype


def _float_leaves(state: Any) -> list[np.ndarray]:
    """The float arrays of a NumPy state in the order of its own mappings."""
    if state is None:
        return []
    if isinstance(state, Mapping):
        return [leaf for part in state.values() for leaf in _float_leaves(part)]
    return [state] if np.asarray(state).dtype.kind == "f" else []


def _named_grads(
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


def _is_installed(framework: str) -> bool:
    spec = importlib.util.find_spec(framework)
    # Else the folders tests/jax and tests/torch would do as packages without an __init__.
    return spec is not None and spec.origin is not None


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (JaxBackend(), TorchBackend())
    if _is_installed(backend.name)
}
