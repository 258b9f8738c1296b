"""The table: every parameter of a Griffin model, declared once.

Both twins build and initialise their parameters from `layer_spec(config)`; checkpoint readers and
writers, weight decay, LoRA targets, sharding rules and parameter counts loop over it. A temporal
block type is an entry of `_TEMPORAL_BLOCKS`.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from recurrentgemma.common.model.config import GriffinConfig
from recurrentgemma.common.model.init import Init, Normal, RingLog, Zeros
from recurrentgemma.common.model.layouts import (
    Layouts,
    Stored,
    conv_weight,
    gated_halves,
    kernel,
    same,
)
from recurrentgemma.common.model.presets import TemporalBlockType

CONV1D_WIDTH = 4


class ParamSpec(NamedTuple):
    """One parameter.

    Attributes:
      path: Dotted path, also of the Flax tree ("blocks.N" is one level there).
      shape: Shape in the Flax layout.
      init: Distribution of initial values.
      axes: Logical name of each axis; sharding rules read these.
      decay: Whether weight decay applies.
      lora: The group of LoRA targets this parameter belongs to, if any.
      matrix: Whether it is a matrix, or a stack of them, that may be quantised.
      torch: How a PyTorch state dict stores it.
      hf: How Hugging Face's RecurrentGemma stores it: one tensor or several.
      wide: Whether it is computed with in float32 or wider, whatever its own dtype; the others meet
        in matrix products, which take one dtype.
    """

    path: str
    shape: tuple[int, ...]
    init: Init
    axes: tuple[str, ...]
    decay: bool
    lora: str | None
    torch: Stored
    hf: tuple[Stored, ...]
    matrix: bool = False
    wide: bool = False

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@functools.lru_cache(maxsize=32)
def layer_spec(config: GriffinConfig) -> tuple[ParamSpec, ...]:
    """Every parameter of the model, in the order of the forward pass."""
    return tuple(_parameters(config))


@functools.lru_cache(maxsize=32)
def spec_by_path(config: GriffinConfig) -> Mapping[str, ParamSpec]:
    """The layer spec, keyed by path."""
    return {spec.path: spec for spec in layer_spec(config)}


def num_parameters(config: GriffinConfig) -> int:
    """Number of values in all parameters."""
    return sum(spec.size for spec in layer_spec(config))


def sample_params(config: GriffinConfig, seed: int) -> Iterator[tuple[ParamSpec, np.ndarray]]:
    """Initial values of every parameter, float32 in the Flax layout, one at a time."""
    for spec in layer_spec(config):
        yield spec, sample_param(spec, seed)


def sample_param(spec: ParamSpec, seed: int) -> np.ndarray:
    """Initial values of one parameter, float32 in the Flax layout.

    Each parameter has its own random stream, from the seed and its path: the same seed gives the
    same weights in both frameworks, bit for bit, and a parameter's values do not depend on which
    others the model has.
    """
    rng = np.random.default_rng([seed, zlib.crc32(spec.path.encode())])
    return spec.init.sample(rng, spec.shape)


def mismatches(
    expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Every difference between two tables of shapes, as one phrase each."""
    problems = [f"missing {name} {expected[name]}" for name in expected if name not in actual]
    problems += [f"unexpected {name} {actual[name]}" for name in actual if name not in expected]
    problems += [
        f"{name} must have shape {expected[name]}, got {actual[name]}"
        for name in expected
        if name in actual and expected[name] != actual[name]
    ]
    return problems


def require_match(
    expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises `ValueError` with every difference between two tables of shapes, if there is any."""
    problems = mismatches(expected, actual)
    if problems:
        count = f"{len(problems)} difference{'s' * (len(problems) > 1)}"
        raise ValueError(
            f"the parameters do not match the config ({count}):\n  " + "\n  ".join(problems)
        )


class _Entry(NamedTuple):
    """A parameter relative to its block."""

    path: str
    shape: tuple[int, ...]
    init: Init
    axes: tuple[str, ...]
    layouts: Layouts
    decay: bool = False
    lora: str | None = None
    wide: bool = False


def _norm(path: str, hf_name: str, c: GriffinConfig) -> _Entry:
    layouts = same(f"{hf_name}.weight")
    return _Entry(f"{path}.scale", (c.width,), Zeros(), ("width",), layouts, wide=True)


def _linear(
    path: str,
    sizes: tuple[int, int],
    axes: tuple[str, str],
    hf_name: str,
    lora: str,
    variance: float = 1.0,
    bias: bool = True,
) -> Iterator[_Entry]:
    """A Dense layer whose kernel has variance `variance` / fan-in."""
    std = math.sqrt(variance / sizes[0])
    yield _Entry(f"{path}.kernel", sizes, Normal(std), axes, kernel(hf_name), True, lora)
    if bias:
        yield _Entry(f"{path}.bias", sizes[1:], Zeros(), axes[1:], same(f"{hf_name}.bias"))


def _recurrent_block(c: GriffinConfig) -> Iterator[_Entry]:
    width, lru, heads = c.width, c.lru_width, c.num_heads
    block, hf = "recurrent_block", "temporal_block"
    for name in ("linear_y", "linear_x"):
        yield from _linear(
            f"{block}.{name}", (width, lru), ("width", "lru"), f"{hf}.{name}", "recurrent"
        )
    yield _Entry(
        f"{block}.conv_1d.w",
        (CONV1D_WIDTH, lru),
        Normal(math.sqrt(0.01 / CONV1D_WIDTH)),
        ("conv", "lru"),
        conv_weight,
        decay=True,
        wide=True,
    )
    for path, init, hf_name in (
        ("conv_1d.b", Zeros(), "conv_1d.bias"),
        ("rg_lru.a_param", RingLog(0.9, 0.999), "rg_lru.recurrent_param"),
    ):
        layouts = same(f"{hf}.{hf_name}")
        yield _Entry(f"{block}.{path}", (lru,), init, ("lru",), layouts, wide=True)
    per_head = lru // heads
    for gate, hf_gate in (("input_gate", "input_gate"), ("a_gate", "recurrent_gate")):
        yield _Entry(
            f"{block}.rg_lru.{gate}.w",
            (heads, per_head, per_head),
            Normal(math.sqrt(1 / per_head)),
            ("heads", "head_in", "head_out"),
            same(f"{hf}.rg_lru.{hf_gate}_weight"),
            lora="gates",
        )
        yield _Entry(
            f"{block}.rg_lru.{gate}.b",
            (heads, per_head),
            Zeros(),
            ("heads", "head_out"),
            same(f"{hf}.rg_lru.{hf_gate}_bias"),
        )
    yield from _linear(
        f"{block}.linear_out",
        (lru, width),
        ("lru", "width"),
        f"{hf}.linear_out",
        "recurrent",
        variance=2 / c.num_layers,
    )


def _attention_block(c: GriffinConfig) -> Iterator[_Entry]:
    width, block, hf = c.width, "attention_block", "temporal_block"
    for name, size, axis in (
        ("q", width, "heads"),
        ("k", c.head_dim, "kv"),
        ("v", c.head_dim, "kv"),
    ):
        yield from _linear(
            f"{block}.proj_{name}",
            (width, size),
            ("width", axis),
            f"{hf}.{name}_proj",
            "attention",
            bias=False,
        )
    yield from _linear(
        f"{block}.proj_final",
        (width, width),
        ("heads", "width"),
        f"{hf}.o_proj",
        "attention",
        variance=2 / c.num_layers,
    )


_TEMPORAL_BLOCKS: dict[TemporalBlockType, Callable[[GriffinConfig], Iterator[_Entry]]] = {
    TemporalBlockType.RECURRENT: _recurrent_block,
    TemporalBlockType.ATTENTION: _attention_block,
}


def _mlp_block(c: GriffinConfig) -> Iterator[_Entry]:
    width, mlp = c.width, c.mlp_expanded_width
    yield _Entry(
        "mlp_block.ffw_up.w",
        (2, width, mlp),
        Normal(math.sqrt(1 / width)),
        ("gate", "width", "mlp"),
        gated_halves("weight"),
        decay=True,
        lora="mlp",
    )
    yield _Entry(
        "mlp_block.ffw_up.b",
        (2, 1, 1, mlp),
        Zeros(),
        ("gate", "batch", "time", "mlp"),
        gated_halves("bias"),
    )
    yield from _linear(
        "mlp_block.ffw_down",
        (mlp, width),
        ("mlp", "width"),
        "mlp_block.down_proj",
        "mlp",
        variance=2 / c.num_layers,
    )


def _residual_block(c: GriffinConfig, block_type: TemporalBlockType) -> Iterator[_Entry]:
    yield _norm("temporal_pre_norm", "temporal_pre_norm", c)
    yield from _TEMPORAL_BLOCKS[block_type](c)
    yield _norm("channel_pre_norm", "channel_pre_norm", c)
    yield from _mlp_block(c)


def _parameters(c: GriffinConfig) -> Iterator[ParamSpec]:
    def place(e: _Entry, prefix: str, hf_prefix: str) -> ParamSpec:
        path = prefix + e.path
        torch, hf = e.layouts(path, hf_prefix, e.shape)
        matrix = e.lora is not None
        return ParamSpec(path, e.shape, e.init, e.axes, e.decay, e.lora, torch, hf, matrix, e.wide)

    embedding = _Entry(
        "embedder.input_embedding",
        (c.vocab_size, c.width),
        Normal(math.sqrt(1 / c.width)),
        ("vocab", "width"),
        same("embed_tokens.weight"),
    )
    yield place(embedding, "", "model.")
    for i, block_type in enumerate(c.block_types):
        for entry in _residual_block(c, block_type):
            yield place(entry, f"blocks.{i}.", f"model.layers.{i}.")
    yield place(_norm("final_norm", "final_norm", c), "", "model.")
