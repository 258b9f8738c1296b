"""The state between two chunks: each failure of the published code that concerns it."""

import functools
import importlib
from typing import Any

import numpy as np
import pytest
from cases import CONFIGS, make_config, make_params, make_tokens, positions
from sweeps import sweep

from backends import Backend
from recurrentgemma.common.io.arrays import BFLOAT16
from recurrentgemma.common.model import reference
from recurrentgemma.common.model.griffin import GriffinConfig
from tolerances import assert_close

CONFIG = CONFIGS["griffin"]
BLOCKS = {"blocks.0": "recurrent", "blocks.1": "recurrent", "blocks.2": "attention"}


@functools.cache
def model_of(backend: Backend, config: GriffinConfig = CONFIG):
    return backend.griffin(config, make_params(config))


def cache_module(backend: Backend) -> Any:
    return importlib.import_module(f"recurrentgemma.{backend.name}.cache")


def native_dtype(backend: Backend, dtype: str) -> Any:
    return getattr(
        importlib.import_module("torch" if backend.name == "torch" else "jax.numpy"), dtype
    )


def run(backend: Backend, rows: list[list[int]], state: Any = None, seed: int = 0):
    """Tokens drawn by place in the row from its end, so that padding moves none."""
    segment_pos = np.array(rows, np.int32)
    tokens = make_tokens(CONFIG, len(rows), 64, seed=seed)[:, 64 - segment_pos.shape[1] :]
    return model_of(backend)(tokens, segment_pos, state)


# -------------------------------------------------------------------------- passing it on


def test_a_cache_is_not_changed(backend: Backend) -> None:
    """Two continuations of one cache, of one token and of several, in the twin's own arrays."""
    _, call = backend.raw_griffin(CONFIG, make_params(CONFIG))
    tokens = make_tokens(CONFIG, 2, 12)
    _, cache = call(tokens, np.tile(np.arange(12, dtype=np.int32), (2, 1)), None)
    before = backend.to_numpy(cache)
    copies = {b: {f: leaf.copy() for f, leaf in fields.items()} for b, fields in before.items()}
    results = []
    for length in (1, 5, 1):
        place = np.tile(np.arange(12, 12 + length, dtype=np.int32), (2, 1))
        logits, new_cache = call(make_tokens(CONFIG, 2, length, seed=1), place, cache)
        results.append(backend.to_numpy(logits))
        assert new_cache is not cache
        after = backend.to_numpy(cache)
        for block, fields in copies.items():
            for field, leaf in fields.items():
                np.testing.assert_array_equal(after[block][field], leaf, err_msg=field)
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("seen", [3, 20])
def test_many_tokens_go_on_as_one_by_one(backend: Backend, seen: int) -> None:
    _, state = run(backend, [positions([seen]), positions([seen])])
    rows = [list(range(seen, seen + 6))] * 2
    together, after = run(backend, rows, state, seed=1)
    expected, expected_state = reference.forward(
        CONFIG,
        make_params(CONFIG),
        make_tokens(CONFIG, 2, 64, seed=1)[:, -6:],
        np.array(rows),
        state,
    )
    assert_close(together, expected, "logits", "float64")
    assert_close(after, expected_state, "state", "float64")
    tokens = make_tokens(CONFIG, 2, 64, seed=1)[:, -6:]
    for t in range(6):
        place = np.full((2, 1), seen + t, np.int32)
        logits, state = model_of(backend)(tokens[:, t : t + 1], place, state)
        assert_close(logits[:, 0], together[:, t], "logits", "float64")
    assert_close(state, after, "state", "float64")


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_short_last_document_decodes_alone(backend: Backend, last: int) -> None:
    """Packed behind a longer one, of which nothing may be left."""
    _, packed = run(backend, [positions([9 - last, last]), positions([9 - last, last])])
    _, alone = run(backend, [positions([last], 9 - last), positions([last], 9 - last)])
    assert_close(packed, alone, "state", "float64")
    rows = [list(range(last, last + 6))] * 2
    logits, _ = run(backend, rows, packed, seed=1)
    expected, _ = run(backend, rows, alone, seed=1)
    assert_close(logits, expected, "logits", "float64")


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_short_padded_prompt_is_an_unpadded_one(backend: Backend, length: int) -> None:
    """The state of the convolution holds no padding."""
    padded, state = run(backend, [positions([9]), positions([length], 9 - length)])
    plain, plain_state = run(backend, [positions([length]), positions([length])])
    assert_close(padded[1, -length:], plain[1], "logits", "float64")
    row = {b: {f: leaf[1] for f, leaf in fields.items()} for b, fields in state.items()}
    plain_row = {b: {f: leaf[1] for f, leaf in fields.items()} for b, fields in plain_state.items()}
    assert_close(row, plain_row, "state", "float64")
    conv = state["blocks.0"]["conv1d_state"][1]
    assert conv.any(-1).tolist() == [length >= 3, length >= 2, True]


def test_a_row_of_padding_keeps_its_state(backend: Backend) -> None:
    _, state = run(backend, [positions([9])] * 3)
    rows = [list(range(9, 15)), [-1] * 6, [-1] * 4 + [9, 10]]
    logits, after = run(backend, rows, state, seed=1)
    assert np.isfinite(logits).all()
    for block, fields in after.items():
        for field, leaf in fields.items():
            np.testing.assert_array_equal(leaf[1], state[block][field][1], err_msg=field)
            assert (leaf[2] != state[block][field][2]).any()
    _, nothing = run(backend, [positions([6]), [-1] * 6, positions([6])])
    for block, fields in nothing.items():
        for field, leaf in fields.items():
            assert not leaf[1].any(), f"{block}.{field}"
            assert leaf[0].any()


def test_no_tokens_change_nothing(backend: Backend) -> None:
    _, state = run(backend, [positions([9])] * 2)
    tokens = np.zeros((2, 0), np.int32)
    logits, after = model_of(backend)(tokens, tokens, state)
    assert logits.shape == (2, 0, CONFIG.vocab_size)
    assert_close(after, state, "state", "float64")
    for block, fields in after.items():
        for field, leaf in fields.items():
            np.testing.assert_array_equal(leaf, state[block][field], err_msg=field)
    _, empty = model_of(backend)(tokens, tokens)
    assert_close(empty, reference.init_state(CONFIG, 2), "state", "float64")


def test_no_state_is_the_empty_state(backend: Backend) -> None:
    rows = [positions([9]), positions([4, 5]), positions([2], 7)]
    logits, state = run(backend, rows)
    again, same = run(backend, rows, reference.init_state(CONFIG, 3))
    real = np.array(rows) >= 0
    assert_close(again[real], logits[real], "logits", "float64")
    assert_close(same, state, "state", "float64")


# -------------------------------------------------------------------------- what it is made of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_of_the_state(backend: Backend, dtype: str) -> None:
    """The recurrent state is float32 at least; a pass leaves the dtypes of `init_cache`."""
    model, call = backend.raw_griffin(CONFIG, make_params(CONFIG), dtype)
    empty = model.init_cache(2)
    tokens = make_tokens(CONFIG, 2, 5)
    place = np.tile(np.arange(5, dtype=np.int32), (2, 1))
    logits, fresh = call(tokens, place, None)
    _, continued = call(tokens, place + 5, fresh)
    assert str(logits.dtype).removeprefix("torch.") == "float32"
    expected = {
        "rg_lru_state": "float32",
        "conv1d_state": dtype,
        "keys": dtype,
        "values": dtype,
        "num_tokens": "int32",
    }
    for cache in (empty, fresh, continued):
        assert list(cache) == list(BLOCKS)
        for block_cache in cache.values():
            for field, leaf in block_cache._asdict().items():
                assert str(leaf.dtype).removeprefix("torch.") == expected[field], field


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_types_of_init_cache(backend: Backend, dtype: str) -> None:
    model, _ = backend.raw_griffin(CONFIG, make_params(CONFIG))
    cache = model.init_cache(3, native_dtype(backend, dtype))
    names = {"recurrent": "RecurrentBlockCache", "attention": "AttentionBlockCache"}
    for block, kind in BLOCKS.items():
        assert type(cache[block]) is getattr(backend.module, names[kind])
    values = backend.to_numpy(cache)
    expected = reference.init_state(CONFIG, 3)
    assert_close(values, expected, "state", "float64")
    assert str(cache["blocks.0"].conv1d_state.dtype).endswith(dtype)
    assert str(cache["blocks.0"].rg_lru_state.dtype).endswith("float32")


def test_init_cache_is_on_the_model_s_device() -> None:
    pytest.importorskip("torch.nn", reason="torch is not installed")
    from recurrentgemma.torch import Griffin

    for device in ("cpu", "meta"):
        cache = Griffin(CONFIG, device=device).init_cache(2)
        devices = {leaf.device.type for fields in cache.values() for leaf in fields}
        assert devices == {device}


# -------------------------------------------------------------------------- between the twins


HANDED = [
    ("griffin", 1),
    ("griffin", -1),
    ("attention_last", 1),
    ("attention_first", -1),
    ("attention", 1),
    ("recurrent", -1),
]


@pytest.mark.parametrize(
    ("name", "order"), sweep(HANDED, [(name, order) for name in CONFIGS for order in (1, -1)])
)
def test_hand_over_in_mid_sequence(twins: tuple[Backend, Backend], name: str, order: int) -> None:
    """From JAX to PyTorch, or from PyTorch to JAX."""
    config = CONFIGS[name]
    first, second = twins[::order]
    tokens, place = make_tokens(config, 2, 15), np.array([positions([15]), positions([4, 8], 3)])
    place = place.astype(np.int32)
    with first.precision("float64"):
        _, call = first.raw_griffin(config, make_params(config), "float64")
        _, cache = call(tokens[:, :11], place[:, :11], None)
        arrays = cache_module(first).cache_to_numpy(cache)
    assert all(
        isinstance(leaf, np.ndarray) for fields in arrays.values() for leaf in fields.values()
    )
    with second.precision("float64"):
        model, call = second.raw_griffin(config, make_params(config), "float64")
        cache = cache_module(second).cache_from_numpy(
            config, arrays, native_dtype(second, "float64")
        )
        assert type(cache) is type(model.init_cache(2))
        logits, cache = call(tokens[:, 11:], place[:, 11:], cache)
        logits, after = second.to_numpy(logits), cache_module(second).cache_to_numpy(cache)
    expected, expected_state = reference.forward(config, make_params(config), tokens, place)
    assert_close(logits, expected[:, 11:], "logits", "float64")
    assert_close(after, expected_state, "state", "float64")


def test_bfloat16_goes_through_numpy_unchanged(backend: Backend) -> None:
    _, call = backend.raw_griffin(CONFIG, make_params(CONFIG), "bfloat16")
    _, cache = call(make_tokens(CONFIG, 2, 9), np.tile(np.arange(9, dtype=np.int32), (2, 1)), None)
    arrays = cache_module(backend).cache_to_numpy(cache)
    assert arrays["blocks.2"]["keys"].dtype == BFLOAT16
    back = cache_module(backend).cache_from_numpy(CONFIG, arrays, native_dtype(backend, "bfloat16"))
    for block, fields in cache.items():
        for field, leaf in fields._asdict().items():
            other = getattr(back[block], field)
            assert other.dtype == leaf.dtype
            np.testing.assert_array_equal(backend.to_numpy(other), backend.to_numpy(leaf))


def test_bad_states_are_refused_with_every_problem(backend: Backend) -> None:
    state = reference.init_state(CONFIG, 2)
    del state["blocks.0"]["rg_lru_state"]
    state["blocks.1"]["conv1d_state"] = np.zeros((2, 4, CONFIG.lru_width))
    state["blocks.2"]["extra"] = np.zeros(2)
    state["blocks.2"]["values"] = state["blocks.2"]["values"][:1]
    state["blocks.7"] = {"keys": np.zeros((2, 3))}
    with pytest.raises(ValueError, match="not the state of such a model") as caught:
        cache_module(backend).cache_from_numpy(CONFIG, state, native_dtype(backend, "float32"))
    for problem in (
        "missing blocks.0.rg_lru_state",
        "unexpected blocks.2.extra",
        "unexpected blocks.7.keys",
        f"blocks.1.conv1d_state must have shape [B, 3, {CONFIG.lru_width}], got (2, 4,",
        "one batch size expected, got [1, 2]",
    ):
        assert problem in str(caught.value)


# -------------------------------------------------------------------------- what may go in


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_numpy_inputs(backend: Backend, dtype: type) -> None:
    _, call = backend.raw_griffin(CONFIG, make_params(CONFIG))
    tokens = make_tokens(CONFIG, 2, 7)
    place = np.tile(np.arange(7, dtype=np.int32), (2, 1))
    expected, _ = call(tokens, place, None)
    logits, _ = call(tokens.astype(dtype), place.astype(dtype), None)
    np.testing.assert_array_equal(backend.to_numpy(logits), backend.to_numpy(expected))


def test_read_only_inputs_are_taken_and_left_alone(backend: Backend) -> None:
    """As `np.asarray` makes of a JAX array, and `np.broadcast_to` of positions."""
    _, call = backend.raw_griffin(CONFIG, make_params(CONFIG))
    tokens = make_tokens(CONFIG, 2, 7)
    tokens.flags.writeable = False
    place = np.broadcast_to(np.arange(7, dtype=np.int32), (2, 7))
    logits, _ = call(tokens, place, None)
    expected, _ = call(tokens.copy(), place.copy(), None)
    np.testing.assert_array_equal(backend.to_numpy(logits), backend.to_numpy(expected))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("tokens", "place"), [((2, 7), (2, 6)), ((7,), (7,)), ((2, 7), (7,)), ((1, 2, 7), (1, 2, 7))]
)
def test_shapes_that_do_not_fit(backend: Backend, tokens, place) -> None:
    _, call = backend.raw_griffin(CONFIG, make_params(CONFIG))
    with pytest.raises(ValueError, match=r"tokens and segment_pos must have one shape \[B, T\]"):
        call(np.zeros(tokens, np.int32), np.zeros(place, np.int32), None)


@pytest.mark.parametrize("kind", ["Conv1D", "RGLRU", "RecurrentBlock", "LocalAttentionBlock"])
def test_torch_modules_write_to_no_input(kind: str) -> None:
    """Nor to a leaf that needs a gradient, which would raise."""
    pytest.importorskip("torch.nn", reason="torch is not installed")
    import torch

    from backends import BACKENDS

    prefixes = {
        "Conv1D": "blocks.0.recurrent_block.conv_1d",
        "RGLRU": "blocks.0.recurrent_block.rg_lru",
        "RecurrentBlock": "blocks.0.recurrent_block",
        "LocalAttentionBlock": "blocks.2.attention_block",
    }
    backend = BACKENDS["torch"]
    block: Any = backend.block(kind, CONFIG, prefixes[kind], make_params(CONFIG))
    width = CONFIG.lru_width if kind in ("Conv1D", "RGLRU") else CONFIG.width
    x = torch.randn(2, 6, width, dtype=torch.float64, requires_grad=True)
    place = torch.tensor([[4, 5, 6, 0, 1, 2], [-1, -1, 4, 5, 6, 7]])
    _, state = block.module(torch.randn(2, 4, width, dtype=torch.float64), place[:, :4], None)
    single = isinstance(state, torch.Tensor)
    leaves = [leaf.detach().clone() for leaf in ([state] if single else state)]
    for leaf in leaves:
        leaf.requires_grad_(leaf.is_floating_point())
    state = leaves[0] if single else type(state)(*leaves)
    copies = [value.detach().clone() for value in (x, place, *leaves)]
    y, _ = block.module(x, place, state)
    y.sum().backward()
    for value, copy in zip((x, place, *leaves), copies, strict=True):
        assert torch.equal(value, copy)
    assert x.grad is not None


# -------------------------------------------------------------------------- torch.func


# Of the fused attention, which under vmap goes row by row on the CPU.
@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_torch_func_over_a_model_with_a_cache(checkpointing: bool) -> None:
    """grad through parameters and cache, and vmap over rows, each with its own cache."""
    pytest.importorskip("torch.nn", reason="torch is not installed")
    import torch

    from backends import BACKENDS

    network: Any = BACKENDS["torch"].griffin(
        CONFIG, make_params(CONFIG), gradient_checkpointing=checkpointing
    )
    model = network.module
    tokens = torch.from_numpy(make_tokens(CONFIG, 3, 15))
    place = torch.tensor([positions([15]), positions([11, 4]), positions([12], 3)])
    with torch.no_grad():
        _, cache = model(tokens[:, :9], place[:, :9])
    tokens, place = tokens[:, 9:], place[:, 9:]
    params = {name: value.detach() for name, value in model.named_parameters()}

    def loss(params, cache, tokens, place):
        logits, new_cache = torch.func.functional_call(model, params, (tokens, place, cache))
        kept = [
            leaf.sum()
            for fields in new_cache.values()
            for leaf in fields
            if leaf.is_floating_point()
        ]
        return logits.square().sum() + sum(kept)

    given = torch.func.grad(loss)(params, cache, tokens, place)
    by_autograd = torch.autograd.grad(
        loss(dict(model.named_parameters()), cache, tokens, place), list(model.parameters())
    )
    for (name, one), other in zip(given.items(), by_autograd, strict=True):
        assert_close(one.numpy(), other.numpy(), "gradient", "float64", name=name)

    states = torch.func.grad(lambda h: loss(params, with_state(cache, h), tokens, place))(
        cache["blocks.0"].rg_lru_state
    )
    assert states.abs().max() > 0

    def one_row(cache, tokens, place):
        with_batch = {
            block: type(fields)(*(leaf[None] for leaf in fields)) for block, fields in cache.items()
        }
        logits, _ = torch.func.functional_call(
            model, params, (tokens[None], place[None], with_batch)
        )
        return logits[0]

    with torch.no_grad():
        expected, _ = model(tokens, place, cache)
    rows = torch.vmap(one_row)(cache, tokens, place)
    assert_close(rows.numpy(), expected.numpy(), "logits", "float64")

    def row_loss(params, cache, tokens, place):
        with_batch = {
            block: type(fields)(*(leaf[None] for leaf in fields)) for block, fields in cache.items()
        }
        return loss(params, with_batch, tokens[None], place[None])

    each = torch.vmap(torch.func.grad(row_loss), (None, 0, 0, 0))(params, cache, tokens, place)
    for name, gradient in each.items():
        assert_close(gradient.sum(0).numpy(), given[name].numpy(), "gradient", "float64", name=name)


def with_state(cache: Any, rg_lru_state: Any) -> Any:
    return {**cache, "blocks.0": cache["blocks.0"]._replace(rg_lru_state=rg_lru_state)}


def test_jax_transforms_over_a_model_with_a_cache() -> None:
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    import jax

    from backends import BACKENDS

    config = make_config("RA", attention_window_size=4)
    backend = BACKENDS["jax"]
    with backend.precision("float64"):
        model, call = backend.raw_griffin(config, make_params(config), "float64")
        params = call.args[1]
        tokens, place = make_tokens(config, 3, 10), np.tile(np.arange(10, dtype=np.int32), (3, 1))
        _, cache = call(tokens[:, :6], place[:, :6], None)

        def row(cache, tokens, place):
            cache = jax.tree.map(lambda leaf: leaf[None], cache)
            return model.apply({"params": params}, tokens[None], place[None], cache)[0][0]

        rows = jax.jit(jax.vmap(row))(cache, tokens[:, 6:], place[:, 6:])
        expected, _ = call(tokens[:, 6:], place[:, 6:], cache)
        assert_close(np.asarray(rows), np.asarray(expected), "logits", "float64")


# -------------------------------------------------------------------------- bfloat16


def test_bfloat16_goes_on_as_it_would_have(backend: Backend) -> None:
    """A prefill and decoding against one pass, within bfloat16; and both against the reference."""
    params = make_params(CONFIG)
    model = backend.griffin(CONFIG, params, "bfloat16")
    tokens, place = make_tokens(CONFIG, 2, 20), np.tile(np.arange(20, dtype=np.int32), (2, 1))
    whole, whole_state = model(tokens, place)
    parts, state = [], None
    for part in (slice(0, 11), *(slice(t, t + 1) for t in range(11, 20))):
        logits, state = model(tokens[:, part], place[:, part], state)
        parts.append(logits)
    assert_close(np.concatenate(parts, 1), whole, "logits", "bfloat16")
    assert_close(state, whole_state, "state", "bfloat16")
