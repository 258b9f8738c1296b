"""Layers and blocks one by one: against the reference, and the twins' gradients."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from cases import bfloat16, make_config, make_params, positions
from sweeps import sweep

from backends import Backend
from recurrentgemma.common.model import reference
from tolerances import assert_close

CONFIG = make_config("RA", lru_width=32, attention_window_size=6)
RECURRENT, ATTENTION = CONFIG.model.layers
RECURRENT_MIXER: Any = RECURRENT.mixer
ATTENTION_MIXER: Any = ATTENTION.mixer
LENGTH = 11
# Row 0 goes on with a document at position 5, row 1 ends one and has two more, row 2 is padded.
CONTINUED = np.array(
    [list(range(5, 16)), [5, 6, *positions([4, 5])], [*positions([], 3), *range(5, 13)]], np.int32
)
FRESH = np.array([positions([11]), positions([2, 4, 5]), positions([8], 3)], np.int32)
SINGLE = np.array([[5], [0], [-1]], np.int32)


def conv_1d(params, x, segment_pos, state):
    return reference.conv_1d(x, params["w"], params["b"], segment_pos, state)


# kind -> prefix of its parameters, width of its input, what the reference says of one row.
WITH_STATE: dict[str, tuple[str, str, int, Callable[..., Any]]] = {
    "Conv1D": ("Conv1D", "blocks.0.recurrent_block.conv_1d", CONFIG.lru_width, conv_1d),
    "RGLRU": ("RGLRU", "blocks.0.recurrent_block.rg_lru", CONFIG.lru_width, reference.rg_lru),
    "RecurrentBlock": (
        "RecurrentBlock",
        "blocks.0.recurrent_block",
        CONFIG.width,
        functools.partial(reference.recurrent_block, RECURRENT_MIXER),
    ),
    "LocalAttentionBlock": (
        "LocalAttentionBlock",
        "blocks.1.attention_block",
        CONFIG.width,
        functools.partial(reference.attention_block, ATTENTION_MIXER),
    ),
    "ResidualBlock-recurrent": (
        "ResidualBlock",
        "blocks.0",
        CONFIG.width,
        functools.partial(reference.residual_block, RECURRENT),
    ),
    "ResidualBlock-attention": (
        "ResidualBlock",
        "blocks.1",
        CONFIG.width,
        functools.partial(reference.residual_block, ATTENTION),
    ),
}
WITHOUT_STATE: dict[str, tuple[str, int, Callable[..., Any]]] = {
    "RMSNorm": (
        "blocks.0.temporal_pre_norm",
        CONFIG.width,
        lambda params, x: reference.rms_norm(x, params["scale"]),
    ),
    "BlockDiagonalLinear": (
        "blocks.0.recurrent_block.rg_lru.a_gate",
        CONFIG.lru_width,
        lambda params, x: reference.block_diagonal_linear(x, params["w"], params["b"]),
    ),
    "MLPBlock": ("blocks.0.mlp_block", CONFIG.width, reference.mlp_block),
}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def _tree_map(function: Callable[[np.ndarray], Any], tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _tree_map(function, part) for key, part in tree.items()}
    return function(tree)


def like(tree: Any, seed: int = 1) -> Any:
    """Random values in the shapes of a state's float arrays."""
    rng = np.random.default_rng(seed)
    return _tree_map(
        lambda leaf: rng.standard_normal(leaf.shape) if leaf.dtype.kind == "f" else leaf, tree
    )


def earlier_state(name: str) -> Any:
    """The state after five tokens of each row, from a twin's point of view."""
    _, prefix, width, function = WITH_STATE[name]
    params = reference.subtree(make_params(CONFIG), prefix)
    empty = empty_state(name)
    x, segment_pos = normal(3, 5, width, seed=7), np.tile(np.arange(5), (3, 1))
    run = functools.partial(function, params)
    return reference.over_rows(run, x, segment_pos, empty)[1]


def empty_state(name: str) -> Any:
    state = reference.init_state(CONFIG, 3)
    block = state["blocks.1" if "ttention" in name else "blocks.0"]
    fields = {"Conv1D": "conv1d_state", "RGLRU": "rg_lru_state"}
    return block[fields[name]] if name in fields else block


def expect(name: str, params, x, segment_pos, state) -> tuple[np.ndarray, Any]:
    _, prefix, _, function = WITH_STATE[name]
    run = functools.partial(function, reference.subtree(params, prefix))
    state = empty_state(name) if state is None else state
    return reference.over_rows(run, x, segment_pos, state)


@pytest.mark.parametrize("segment_pos", [CONTINUED, FRESH, SINGLE], ids=["on", "fresh", "single"])
@pytest.mark.parametrize("name", WITH_STATE)
def test_with_state(backend: Backend, name: str, segment_pos: np.ndarray) -> None:
    kind, prefix, width, _ = WITH_STATE[name]
    state = None if segment_pos is FRESH else earlier_state(name)
    x = normal(*segment_pos.shape, width)
    expected, expected_state = expect(name, make_params(CONFIG), x, segment_pos, state)
    block = backend.block(kind, CONFIG, prefix, make_params(CONFIG))
    y, new_state = block(x, segment_pos, state)
    real = segment_pos >= 0
    assert_close(y[real], expected[real], "output", "float64")
    assert_close(new_state, expected_state, "state", "float64")


# With a state or without one: the blocks that have none ignore the flag.
EMPTY = [(True, (3, 0)), (True, (0, 1)), (False, (0, 7)), (False, (0, 0))]


@pytest.mark.parametrize(
    ("given", "shape"),
    sweep(EMPTY, [(given, shape) for given in (False, True) for _, shape in EMPTY]),
    ids=str,
)
@pytest.mark.parametrize("name", [*WITH_STATE, *WITHOUT_STATE])
def test_on_nothing(backend: Backend, name: str, given: bool, shape: tuple[int, int]) -> None:
    """Outputs are as empty, and the state, where one is given, stays as it is."""
    if name in WITHOUT_STATE:
        prefix, width, _ = WITHOUT_STATE[name]
        x = np.zeros((*shape, width))
        y, _ = backend.block(name, CONFIG, prefix, make_params(CONFIG))(x)
        assert y.shape == x.shape
        return
    kind, prefix, width, _ = WITH_STATE[name]
    state = earlier_state(name) if given else empty_state(name)
    state = _tree_map(lambda leaf: leaf[: shape[0]], state)
    x = np.zeros((*shape, width))
    block = backend.block(kind, CONFIG, prefix, make_params(CONFIG))
    y, new_state = block(x, np.zeros(shape, np.int32), state if given else None)
    assert y.shape == x.shape
    assert_close(new_state, state, "state", "float64")


@pytest.mark.parametrize("name", WITHOUT_STATE)
def test_without_state(backend: Backend, name: str) -> None:
    prefix, width, function = WITHOUT_STATE[name]
    params = make_params(CONFIG)
    x = normal(3, LENGTH, width)
    y, _ = backend.block(name, CONFIG, prefix, params)(x)
    assert_close(y, function(reference.subtree(params, prefix), x), "output", "float64")


@functools.cache
def gradients(backend: Backend, name: str) -> dict[str, Any]:
    """Of the parameters, the input and the earlier state, through outputs and the new state."""
    if name in WITHOUT_STATE:
        prefix, width, _ = WITHOUT_STATE[name]
        network = backend.block(name, CONFIG, prefix, make_params(CONFIG))
        return network.grads(normal(3, LENGTH, width), dy=normal(3, LENGTH, width, seed=2))
    kind, prefix, width, _ = WITH_STATE[name]
    network = backend.block(kind, CONFIG, prefix, make_params(CONFIG))
    state = earlier_state(name)
    return network.grads(
        normal(3, LENGTH, width), CONTINUED, state, dy=cotangent(width), dstate=like(state)
    )


def cotangent(width: int) -> np.ndarray:
    """Zero at padding, whose outputs mean nothing."""
    return np.where(CONTINUED[..., None] >= 0, normal(*CONTINUED.shape, width, seed=2), 0)


@pytest.mark.parametrize("name", [*WITH_STATE, *WITHOUT_STATE])
def test_gradients_of_the_twins(twins: tuple[Backend, Backend], name: str) -> None:
    one, other = (gradients(backend, name) for backend in twins)
    assert_close(one, other, "gradient", "float64")
    assert one["params"]
    for path, gradient in one["params"].items():
        assert np.abs(gradient).max() > 1e-4, f"{path} has no gradient"


@pytest.mark.parametrize("name", [*WITH_STATE, *WITHOUT_STATE])
def test_gradients_are_the_slopes_of_the_reference(backend: Backend, name: str) -> None:
    """Along a random direction in each of parameters, input and state."""
    given = gradients(backend, name)
    if name in WITHOUT_STATE:
        prefix, width, function = WITHOUT_STATE[name]
        state, dy = None, normal(3, LENGTH, width, seed=2)

        def loss(params, x, state) -> float:
            return float((function(reference.subtree(params, prefix), x) * dy).sum())
    else:
        _, prefix, width, _ = WITH_STATE[name]
        state, dy = earlier_state(name), cotangent(width)
        dstate = like(state)

        def loss(params, x, state) -> float:
            y, new_state = expect(name, params, x, CONTINUED, state)
            pairs = zip(_floats(new_state), _floats(dstate), strict=True)
            return float((y * dy).sum() + sum((leaf * d).sum() for leaf, d in pairs))

    params, x = dict(make_params(CONFIG)), normal(3, LENGTH, width)
    for path, gradient in given["params"].items():
        full, direction = f"{prefix}.{path}", normal(*gradient.shape, seed=3)
        slope = _slope(
            lambda h, p=full, d=direction: loss(params | {p: params[p] + h * d}, x, state)
        )
        assert_close(slope, (gradient * direction).sum(), "slope", "float64", name=path)
    direction = normal(*x.shape, seed=3)
    slope = _slope(lambda h: loss(params, x + h * direction, state))
    # Padding holds anything: no gradient comes from there.
    assert_close(slope, (given["x"] * direction).sum(), "slope", "float64", name="x")
    if state is not None:
        direction = like(state, seed=4)
        slope = _slope(lambda h: loss(params, x, _step(state, direction, h)))
        pairs = zip(_floats(given["state"]), _floats(direction), strict=True)
        expected = sum((g * d).sum() for g, d in pairs)
        assert_close(slope, expected, "slope", "float64", name="state")


def _slope(function: Callable[[float], float], step: float = 1e-5) -> float:
    return (function(step) - function(-step)) / (2 * step)


def _floats(state: Any) -> list[np.ndarray]:
    if isinstance(state, Mapping):
        return [leaf for part in state.values() for leaf in _floats(part)]
    return [state] if state.dtype.kind == "f" else []


def _step(state: Any, direction: Any, h: float) -> Any:
    if isinstance(state, Mapping):
        return {key: _step(value, direction[key], h) for key, value in state.items()}
    return state + h * direction if state.dtype.kind == "f" else state


@pytest.mark.parametrize("name", [*WITH_STATE, *WITHOUT_STATE])
def test_bfloat16(backend: Backend, name: str) -> None:
    """Near the reference on the same rounded numbers."""
    params = {path: bfloat16(value) for path, value in make_params(CONFIG).items()}
    if name in WITHOUT_STATE:
        prefix, width, function = WITHOUT_STATE[name]
        x = bfloat16(normal(3, LENGTH, width))
        y, _ = backend.block(name, CONFIG, prefix, params, "bfloat16")(x)
        assert_close(y, function(reference.subtree(params, prefix), x), "output", "bfloat16")
        return
    kind, prefix, width, _ = WITH_STATE[name]
    x = bfloat16(normal(3, LENGTH, width))
    expected, expected_state = expect(name, params, x, FRESH, None)
    y, new_state = backend.block(kind, CONFIG, prefix, params, "bfloat16")(x, FRESH)
    real = FRESH >= 0
    assert_close(y[real], expected[real], "output", "bfloat16")
    assert_close(new_state, expected_state, "state", "bfloat16")


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("RGLRU", (8, 3), "width must be divisible by num_blocks, got width=8 num_blocks=3"),
        ("Conv1D", (8, 0), "temporal_width must be a positive integer, got 0"),
        ("RMSNorm", (0,), "width must be a positive integer, got 0"),
        ("RecurrentBlock", (8, 3), "width must be divisible by num_blocks"),
        ("LocalAttentionBlock", (8, 3, 4), "width must be divisible by num_heads, got width=8 num"),
        ("MLPBlock", (8, -1), r"w_shape\[2\] must be a positive integer, got -1"),
    ],
)
def test_sizes_that_cannot_be(backend: Backend, kind: str, sizes: tuple, message: str) -> None:
    def build() -> None:
        module = getattr(backend.module, kind)(*sizes)
        if backend.name == "jax":  # which makes parameters when it first runs
            x = backend.array(np.zeros((1, 2, 8)), "float32")
            places = backend.array(np.zeros((1, 2)), "int32")
            arguments = (x,) if kind in ("RMSNorm", "MLPBlock") else (x, places)
            module.init({"params": backend.array(np.zeros(2), "uint32")}, *arguments)

    with pytest.raises(ValueError, match=message):
        build()
