"""Gradients of whole models, through every parameter and the initial state."""

import functools
from typing import Any

import numpy as np
import pytest
from cases import CONFIGS, make_config, make_params, make_tokens, next_token_loss, positions
from sweeps import sweep

from backends import Backend
from recurrentgemma.common.model import reference
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec
from tolerances import assert_close

# Row 0 goes on with its document, row 1 ends it and has two more, row 2 does so behind padding.
SEGMENT_POS = np.array(
    [list(range(6, 17)), [6, 7, *positions([3, 6])], [-1, -1, *range(6, 13), 0, 1]], np.int32
)


@functools.cache
def problem(config: GriffinConfig) -> tuple[np.ndarray, Any, np.ndarray, Any, float]:
    """Tokens, the state before them, gradients of a loss for logits and the new state; the loss.

    The loss is that of the next tokens, over a mask, plus a random product with the new state.
    """
    params = make_params(config)
    earlier = make_tokens(config, 3, 6, seed=1)
    _, state = reference.forward(config, params, earlier, np.tile(np.arange(6), (3, 1)))
    tokens = make_tokens(config, *SEGMENT_POS.shape)
    logits, new_state = reference.forward(config, params, tokens, SEGMENT_POS, state)
    rng = np.random.default_rng(2)
    # Where both are tokens of one document; and not everywhere there.
    mask = (SEGMENT_POS[:, :-1] >= 0) & (SEGMENT_POS[:, 1:] > 0)
    mask = mask * rng.integers(0, 2, mask.shape)
    loss, dlogits = next_token_loss(logits, tokens, mask)
    dstate = {
        block: {
            field: 0.1 * rng.standard_normal(leaf.shape) if leaf.dtype.kind == "f" else leaf
            for field, leaf in fields.items()
        }
        for block, fields in new_state.items()
    }
    return tokens, state, dlogits, dstate, loss


@functools.cache
def gradients(
    backend: Backend, config: GriffinConfig, checkpointing: bool, dtype: str = "float64"
) -> dict[str, Any]:
    tokens, state, dlogits, dstate, _ = problem(config)
    model = backend.griffin(config, make_params(config), dtype, checkpointing)
    return model.grads(tokens, SEGMENT_POS, state, dy=dlogits, dstate=dstate)


@pytest.mark.parametrize("name", CONFIGS)
def test_of_the_twins(twins: tuple[Backend, Backend], name: str) -> None:
    config = CONFIGS[name]
    one, other = (gradients(backend, config, False) for backend in twins)
    assert_close(one, other, "gradient", "float64")
    assert set(one["params"]) == {spec.path for spec in layer_spec(config)}
    for path, gradient in one["params"].items():
        assert np.abs(gradient).max() > 1e-6, f"{path} has no gradient"
    assert set(one["state"]) == {f"blocks.{i}" for i in range(config.num_layers)}
    for block, fields in one["state"].items():
        for field, gradient in fields.items():
            assert np.abs(gradient[0]).max() > 1e-9, f"{block}.{field} has no gradient"


@pytest.mark.parametrize("name", sweep(["griffin"], ["griffin", "attention_first"]))
def test_with_and_without_checkpointing(backend: Backend, name: str) -> None:
    config = CONFIGS[name]
    one, other = (gradients(backend, config, flag) for flag in (True, False))
    assert_close(one, other, "gradient", "float64")


@pytest.mark.parametrize("name", CONFIGS)
def test_are_the_slopes_of_the_reference(backend: Backend, name: str) -> None:
    """Along one random direction through all parameters together, and one through the state."""
    config = CONFIGS[name]
    tokens, state, dlogits, dstate, _ = problem(config)
    given = gradients(backend, config, False)
    params = make_params(config)
    rng = np.random.default_rng(3)
    directions = {path: rng.standard_normal(value.shape) for path, value in params.items()}

    def output(params, state) -> float:
        logits, new_state = reference.forward(config, params, tokens, SEGMENT_POS, state)
        total = (logits * dlogits).sum()
        for block, fields in new_state.items():
            for field, leaf in fields.items():
                if leaf.dtype.kind == "f":
                    total += (leaf * dstate[block][field]).sum()
        return float(total)

    step = 1e-6
    above, below = (
        output({path: params[path] + h * d for path, d in directions.items()}, state)
        for h in (step, -step)
    )
    expected = sum((given["params"][path] * d).sum() for path, d in directions.items())
    assert_close((above - below) / (2 * step), expected, "slope", "float64", name="params")

    moves = {
        block: {
            field: rng.standard_normal(leaf.shape)
            for field, leaf in fields.items()
            if leaf.dtype.kind == "f"
        }
        for block, fields in state.items()
    }

    def moved(h: float) -> Any:
        return {
            block: {
                field: leaf + h * moves[block][field] if field in moves[block] else leaf
                for field, leaf in fields.items()
            }
            for block, fields in state.items()
        }

    step = 1e-4
    above, below = (output(params, moved(h)) for h in (step, -step))
    expected = sum(
        (given["state"][block][field] * d).sum()
        for block, fields in moves.items()
        for field, d in fields.items()
    )
    assert_close((above - below) / (2 * step), expected, "slope", "float64", name="state")


@pytest.mark.parametrize("name", sweep(["attention_last"], ["griffin", "attention_last"]))
def test_in_float32(backend: Backend, name: str) -> None:
    config = CONFIGS[name]
    one, other = gradients(backend, config, True, "float32"), gradients(backend, config, False)
    assert_close(one, other, "gradient", "float32")


def test_padding_gives_no_gradient(backend: Backend) -> None:
    """A row of padding alone, and what stands at padding, change nothing and make no NaN."""
    config = make_config()
    tokens, state, dlogits, dstate, _ = problem(config)
    given = gradients(backend, config, False)
    other_tokens = np.where(SEGMENT_POS < 0, (tokens + 1) % config.vocab_size, tokens)
    model = backend.griffin(config, make_params(config))
    again = model.grads(other_tokens, SEGMENT_POS, state, dy=dlogits, dstate=dstate)
    assert_close(again, given, "gradient", "float64")

    padding = np.full_like(SEGMENT_POS, -1)
    nothing = model.grads(tokens, padding, state, dy=0 * dlogits, dstate=dstate)
    for path, gradient in nothing["params"].items():
        np.testing.assert_array_equal(gradient, 0, err_msg=path)
    for block, fields in nothing["state"].items():
        for field, gradient in fields.items():
            np.testing.assert_array_equal(gradient, dstate[block][field], err_msg=field)


def test_of_the_square_root_are_clipped(backend: Backend) -> None:
    """Where a is all but 1, sqrt(1 - a^2) has a derivative of 1000 and no more.

    With a_param so low that 1 - a^2 is e, d sqrt(e) / d e would be 1 / (2 sqrt(e)).
    """
    config = make_config("R", width=4, lru_width=4, num_heads=1)
    prefix = "blocks.0.recurrent_block.rg_lru"
    zeros = {path: np.zeros_like(value) for path, value in make_params(config).items()}
    a_param = np.array([-10.0, -14.0, -20.0, -25.0])
    params = zeros | {f"{prefix}.a_param": a_param}
    x, segment_pos = np.ones((1, 1, 4)), np.array([[1]])
    state = np.zeros((1, 4))
    unit = backend.block("RGLRU", config, prefix, params)
    dy = np.ones((1, 1, 4))
    given = unit.grads(x, segment_pos, state, dy=dy, dstate=0 * state)["params"]["a_param"]
    # Both gates are sigmoid(0) = 1/2: log a = -4 softplus(p), e = 1 - a^2, y = sqrt(e) / 2.
    softplus, sigmoid = reference.softplus(a_param), reference.sigmoid(a_param)
    e = -np.expm1(-8 * softplus)
    derivative = np.minimum(0.5 / np.sqrt(e), 1000)
    assert (derivative == 1000).tolist() == [False, False, True, True]
    expected = derivative * np.exp(-8 * softplus) * 8 * sigmoid / 2
    assert_close(given, expected, "gradient", "float64")
