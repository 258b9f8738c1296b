"""A model whose attention has no window: its state gets the room that a text needs."""

from typing import Any

import numpy as np
import pytest
from samplers import UNBOUNDED, lists, make_sampler

from recurrentgemma.common.generation.prefill import read_pending
from recurrentgemma.common.generation.strategies import Categorical
from recurrentgemma.common.model.state import State, capacity_of, empty_state

HOT: dict[str, Any] = {
    "sampling": Categorical(1.5),
    "rng": [3, 4],
    "end_sampling_at_eos_token": False,
}


@pytest.fixture
def sampler(twin: str):
    return make_sampler(twin, config=UNBOUNDED)


def texts(*lengths: int) -> State:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(5, UNBOUNDED.vocab_size, size=length).tolist() for length in lengths]
    return empty_state(UNBOUNDED, len(lengths)).extended(tokens)


@pytest.mark.parametrize("burst", [1, 4])
def test_a_state_grows_with_its_texts(sampler, burst: int) -> None:
    sampler.engine.burst = burst
    whole = lists(sampler.generate(texts(250, 3), 20, **HOT).tokens)
    state = read_pending(sampler.engine, texts(250, 3))
    assert capacity_of(UNBOUNDED, state.cache) == 256
    first = sampler.generate(state, 4, **HOT)
    second = sampler.generate(first.state, 16, **HOT)
    assert [capacity_of(UNBOUNDED, out.state.cache) for out in (first, second)] == [256, 512]
    pairs = zip(lists(first.tokens), lists(second.tokens), strict=True)
    assert [one + other for one, other in pairs] == whole
    assert capacity_of(UNBOUNDED, state.cache) == 256


def test_a_grown_state_enters_a_larger_batch(sampler) -> None:
    engine = sampler.engine
    state = read_pending(engine, texts(5, 9))
    batch = engine.put(engine.begin(3, 512), np.array([2, 0]), engine.grow(state.cache, 512))
    back = engine.take(batch, np.array([2, 0]))
    assert capacity_of(UNBOUNDED, back) == 512
    longer = State(UNBOUNDED, back, state.lengths, state.pending, state.seen)
    outs = [sampler.generate(each, 8, **HOT) for each in (state, longer)]
    assert lists(outs[0].tokens) == lists(outs[1].tokens)


def test_nothing_grows_in_a_model_with_windows(twin: str) -> None:
    engine = make_sampler(twin).engine
    assert engine.capacity_for(10_000) is None
    cache = engine.begin(1)
    assert engine.grow(cache, 512) is cache
