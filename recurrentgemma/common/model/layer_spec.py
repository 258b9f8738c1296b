"""Every parameter and every state array of a model, from its layers' declarations.

Both twins build and initialise their parameters from `layer_spec(config)`, and their states from
`state_spec(config)`; checkpoint readers and writers, weight decay, LoRA targets, sharding rules,
state files and tables of memory loop over them.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.config import Config, Layer
from recurrentgemma.common.model.mixers import CAPACITY_BLOCK, block_name
from recurrentgemma.common.model.params import (
    Params,
    ParamSpec,
    StateSpec,
    embedder,
    mlp,
    rms_norm,
    under,
)


@functools.lru_cache(maxsize=32)
def layer_spec(config: Config) -> tuple[ParamSpec, ...]:
    """Every parameter of the model, in the order of the forward pass."""
    return tuple(_parameters(config))


def _parameters(config: Config) -> Params:
    model = config.model
    yield from under("embedder", embedder(model.vocab_size, model.width))
    for i, layer in enumerate(model.layers):
        yield from under(f"blocks.{i}", layer_params(model.width, layer, 2 / len(model.layers)))
    yield from under("final_norm", rms_norm(model.width))


def layer_params(width: int, layer: Layer, variance: float) -> Params:
    """The parameters of one layer; `variance` is for its two output projections."""
    yield from under("temporal_pre_norm", rms_norm(width))
    yield from under(block_name(layer.mixer), layer.mixer.params(width, variance))
    if layer.post_norms:
        yield from under("temporal_post_norm", rms_norm(width))
    yield from under("channel_pre_norm", rms_norm(width))
    yield from under("mlp_block", mlp(width, layer.mlp, layer.mlp_bias, variance))
    if layer.post_norms:
        yield from under("channel_post_norm", rms_norm(width))


def state_spec(config: Config, capacity: int | None = None) -> tuple[StateSpec, ...]:
    """Every array of the model's state, by "blocks.N.field".

    Args:
      config: What the model is.
      capacity: How many tokens a state that grows with the text has room for.
    """
    return tuple(  # not cached: a forward pass calls it, and Dynamo traces no cache
        StateSpec(f"blocks.{i}.{spec.path}", *spec[1:])
        for i, layer in enumerate(config.model.layers)
        for spec in layer.mixer.state(capacity or CAPACITY_BLOCK)
    )


@functools.lru_cache(maxsize=32)
def grows(config: Config) -> bool:
    """Whether the model's state grows with the text."""
    return any(spec.grows for spec in state_spec(config))


@functools.lru_cache(maxsize=32)
def spec_by_path(config: Config) -> Mapping[str, ParamSpec]:
    """The layer spec, keyed by path."""
    return {spec.path: spec for spec in layer_spec(config)}


def num_parameters(config: Config) -> int:
    """Number of values in all parameters."""
    return sum(spec.size for spec in layer_spec(config))


def sample_params(config: Config, seed: int) -> Iterator[tuple[ParamSpec, np.ndarray]]:
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
        raise UserError(
            f"the parameters do not match the config ({count}):\n  " + "\n  ".join(problems)
        )
