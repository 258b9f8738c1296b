"""The JAX twin over NumPy."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from sweeps import sweep

from backends.base import (
    Backend,
    Network,
    float_leaves,
    input_dtype,
    named_grads,
    position_dtype,
    wide_dtype,
)


class JaxBackend(Backend):
    name = "jax"

    def _network(self, kind, arguments, params, dtype, kwargs) -> JaxNetwork:
        from recurrentgemma.jax.runtime.trees import set_path

        module = getattr(self.module, kind)(*arguments, param_dtype=dtype, **kwargs)
        tree: dict[str, Any] = {}
        with self.precision(dtype):
            for path, value in params.items():
                set_path(tree, path, self.array(value, dtype))
        return JaxNetwork(self, kind, module, tree, dtype)

    def raw_griffin(self, config, params, dtype="float32"):
        model = self.twin.make(config, params.items(), dtype)
        return model.module, functools.partial(_jax_functions()[0], *model)

    def implementations(self):
        names = super().implementations()
        # The Pallas kernel of each target, interpreted.
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

    def rg_lru_scan_second_vjp(
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
        directions,
        **kwargs,
    ):
        import jax

        with self.precision("float64"):
            *arrays, segment_pos, h0 = self.rg_lru_arguments(
                x, input_gate, a_gate, a_param, segment_pos, h0, "float64"
            )
            cotangents = self.array(dy, "float64"), self.array(dlast, "float64")

            def gradients(*arrays):
                *arrays, h0 = arrays
                compiled: Any = _jax_functions()[5]
                function = compiled.__wrapped__  # `second` compiles all of it
                return function(*arrays, segment_pos, h0, cotangents, **kwargs)[1]

            @jax.jit
            def second(inputs, directions):
                return jax.vjp(gradients, *inputs)[1](directions)

            directions = tuple(self.array(d, "float64") for d in directions)
            return self.to_numpy(second((*arrays, h0), directions))


PALLAS_TARGETS = ("tpu", "gpu")
SMALL_TILES = {
    "tpu": {"_TILE": 8, "_BLOCK_TIME": 16},
    "gpu": {"_TILE": 2, "_SHORTEST_CHUNK": 8},
}


@contextlib.contextmanager
def small_tiles(target: str) -> Iterator[None]:
    """A context in which few steps are several tiles, blocks and chunks of a Pallas kernel.

    Interpreted steps are slow, and an unrolled tile is slow to compile. The long profile and
    tests/jax/test_pallas.py interpret the kernels as they are.
    """
    kernels = importlib.import_module(f"recurrentgemma.jax.scan.pallas_{target}")
    with contextlib.ExitStack() as patches:
        for name, value in sweep(SMALL_TILES[target], {}).items():
            patches.enter_context(mock.patch.object(kernels, name, value))
        yield


@contextlib.contextmanager
def jax_implementation(label: str = "auto"):
    """A context in which an implementation can be traced; yields the package's name for it.

    The label of a Pallas kernel includes its target. The CPU interprets it; the TPU's runs with
    poisoned memory and a search for races.
    """
    name, _, target = label.partition("-")
    if not target:
        yield name
        return
    from jax.experimental.pallas import tpu as pltpu

    from recurrentgemma.jax.scan import pallas_target

    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with (
        small_tiles(target),
        pallas_target(target, interpret=params if target == "tpu" else True),
    ):
        yield name


@functools.cache
def _jax_functions():
    """Functions that all tests share, so that each shape is compiled once.

    Apply, its gradients; a scan, its gradients; an RG-LRU scan, its gradients.
    """
    import jax
    import jax.numpy as jnp

    from recurrentgemma.jax import linear_scan, rg_lru_scan

    def is_float(leaf) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating)

    def apply(module, params, *args):
        return module.apply({"params": params}, *args)

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

    def scan(*args, implementation="auto", **kwargs):
        with jax_implementation(implementation) as name:
            return linear_scan(*args, implementation=name, **kwargs)

    def scan_vjp(x, a, h0, reset, cotangents, **kwargs):
        def run(x, a, h0):
            return scan(x, a, h0, reset, **kwargs)

        outputs, pullback = jax.vjp(run, x, a, h0)
        return outputs, pullback(cotangents)

    def rg_lru(*args, implementation="auto"):
        with jax_implementation(implementation) as name:
            return rg_lru_scan(*args, implementation=name)

    def rg_lru_vjp(x, input_gate, a_gate, a_param, segment_pos, h0, cotangents, **kwargs):
        def run(x, input_gate, a_gate, a_param, h0):
            return rg_lru(x, input_gate, a_gate, a_param, segment_pos, h0, **kwargs)

        outputs, pullback = jax.vjp(run, x, input_gate, a_gate, a_param, h0)
        return outputs, pullback(cotangents)

    of_modules = [jax.jit(function, static_argnums=0) for function in (apply, grads)]
    static = ("reverse", "implementation")
    scans = [jax.jit(function, static_argnames=static) for function in (scan, scan_vjp)]
    rg_lrus = [jax.jit(function, static_argnames=static[1]) for function in (rg_lru, rg_lru_vjp)]
    return *of_modules, *scans, *rg_lrus


class JaxNetwork(Network):
    def __init__(self, backend: JaxBackend, kind: str, module, params, dtype: str) -> None:
        self.backend, self.kind, self.module, self.dtype = backend, kind, module, dtype
        self.params = params

    def _arguments(self, x, segment_pos, state) -> tuple:
        # Some modules take no positions and no state.
        arguments: list[Any] = [self.backend.array(x, input_dtype(x, self.dtype))]
        if segment_pos is not None:
            arguments.append(self.backend.array(segment_pos, position_dtype(segment_pos)))
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
            cotangents = [self.backend.array(c, wide) for c in [dy, *float_leaves(dstate)]]
            params, floats = _jax_functions()[1](self.module, self.params, arguments, cotangents)
            floats = [self.backend.to_numpy(leaf) for leaf in floats]
            flat = {
                path: self.backend.to_numpy(leaf)
                for path, leaf in zip(_paths(self.params), jax.tree.leaves(params), strict=True)
            }
        return named_grads(flat, x, state, floats)


def _paths(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Paths of a tree's leaves in JAX's order."""
    paths = []
    for key in sorted(tree):
        value = tree[key]
        below = isinstance(value, Mapping)
        paths += _paths(value, f"{prefix}{key}.") if below else [prefix + key]
    return paths
