"""Rows that enter and leave a running batch: each goes on as if it were alone."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from samplers import ATTENTION, CONFIG, LAYERS, PROMPTS, UNBOUNDED, generate, make_sampler

from recurrentgemma.common.generation.prefill import read, read_pending
from recurrentgemma.common.generation.requests import RowRequest
from recurrentgemma.common.generation.settings import row_settings, variant_of
from recurrentgemma.common.generation.stops import Stops
from recurrentgemma.common.generation.strategies import Categorical, row_keys, uniform
from recurrentgemma.common.model.state import State, empty_state

SLOTS, HOT = 4, Categorical(1.5)  # as many as there are prompts: programs are shared
FREE: dict[str, Any] = {"end_sampling_at_eos_token": False}


class RunningBatch:
    """Slots of one engine, as a server has them: all draw, without stops."""

    def __init__(self, engine) -> None:
        self.engine, self.cache = engine, engine.begin(SLOTS)
        rows = [RowRequest(1000, HOT, Stops({}, ()))] * SLOTS
        self.keys: list[np.ndarray | None] = [None] * SLOTS
        self.settings = engine.on_device(row_settings(rows, CONFIG.vocab_size))
        self.variant = variant_of(rows, CONFIG.vocab_size, None, False)
        self.tokens, self.position = np.zeros(SLOTS, np.int32), np.full(SLOTS, -1, np.int32)
        self.texts: list[list[int]] = [[] for _ in range(SLOTS)]

    def enter(self, slot: int, state: State, seed: int) -> None:
        (self.keys[slot],) = row_keys([seed], 1)
        self.cache = self.engine.put(self.cache, np.array([slot]), state.cache)
        self.tokens[slot], self.position[slot] = state.pending[0][0], state.lengths[0]
        self.texts[slot] = []

    def leave(self, slot: int) -> State:
        state = State(
            CONFIG,
            self.engine.take(self.cache, np.array([slot])),
            (int(self.position[slot]),),
            ((int(self.tokens[slot]),),),
            np.zeros((1, CONFIG.vocab_size), bool),
        )
        self.tokens[slot], self.position[slot] = 0, -1
        return state

    def run(self, steps: int, burst: int) -> None:
        for _ in range(steps // burst):
            active = self.position >= 0
            sampled, self.cache, _ = self.engine.decode(
                self.variant,
                self.settings,
                self.cache,
                None,
                self.tokens.copy(),
                self.position.copy(),
                np.where(active, 1000, 0).astype(np.int32),
                uniform(self.keys, np.maximum(self.position + 1, 0), burst),
            )
            tokens = self.engine.on_host(sampled.tokens)
            for slot in np.flatnonzero(active):
                self.texts[slot] += tokens[:, slot].tolist()
                self.tokens[slot], self.position[slot] = (
                    tokens[-1, slot],
                    self.position[slot] + burst,
                )


@pytest.mark.parametrize("burst", [1, 4])
def test_rows_come_and_go(twin: str, burst: int) -> None:
    sampler = make_sampler(twin, sampling=HOT)
    expected = generate(sampler, PROMPTS, 24, rng=[0, 1, 2, 3], **FREE)
    assert min(len(set(row)) for row in expected) > 15
    states = [sampler.prefill(prompt) for prompt in PROMPTS]
    before = [sampler.engine.to_numpy(state.cache) for state in states]
    batch = RunningBatch(sampler.engine)
    batch.enter(0, states[0], 0)
    batch.run(4, burst)
    batch.enter(2, states[1], 1)
    batch.run(8, burst)
    assert batch.texts[0] == expected[0][:12]
    assert batch.texts[2] == expected[1][:8]
    # One row leaves, another takes its slot, and the first comes back elsewhere.
    out = batch.leave(0)
    batch.enter(0, states[2], 2)
    batch.run(4, burst)
    batch.enter(1, out, 0)
    batch.run(8, burst)
    assert batch.texts[0] == expected[2][:12]
    assert batch.texts[1] == expected[0][12:20]
    assert batch.texts[2] == expected[1][:20]
    # A finished row's slot is as it was, also for the sampler.
    alone = sampler.generate(batch.leave(1), 4, rng=[0], **FREE)
    assert np.asarray(alone.tokens[0]).tolist() == expected[0][20:]
    # What was put in or taken out is a copy: nothing that ran since changed it.
    for state, arrays in zip(states, before, strict=True):
        for block, fields in sampler.engine.to_numpy(state.cache).items():
            for field, value in fields.items():
                np.testing.assert_array_equal(value, arrays[block][field])
    again = sampler.generate(out, 12, rng=[0], **FREE)
    assert np.asarray(again.tokens[0]).tolist() == expected[0][12:]


def test_several_rows_and_plain_arrays(twin: str) -> None:
    engine = make_sampler(twin).engine
    prompts = [[2, 7, 8, 9], [2, 5], [2, 30, 31]]
    state = read_pending(engine, empty_state(CONFIG, 3).extended(prompts))
    whole = engine.to_numpy(state.cache)
    some = engine.take(state.cache, np.array([2, 0]))
    turned = engine.put(engine.snapshot(state.cache), np.array([0, 2]), some)
    for block, fields in engine.to_numpy(turned).items():
        for field, value in fields.items():
            np.testing.assert_array_equal(value, whole[block][field][::-1][[0, 1, 2]])
    seen = engine.on_device(np.zeros((3, 5), bool))
    seen = engine.put(seen, np.array([1]), engine.on_device(np.ones((1, 5), bool)))
    assert engine.on_host(seen).sum(1).tolist() == [0, 5, 0]
    assert engine.on_host(engine.take(seen, np.array([1, 1]))).sum() == 10
    cache, last, position = read(engine, state)
    assert (last.tolist(), position.tolist()) == ([9, 5, 31], [3, 1, 2])
    assert engine.owns(cache)


def test_no_bit_depends_on_the_length_of_a_neighbour(twin: str) -> None:
    """Not beside a shorter text, one with over 512 tokens or one of the same length."""
    growing, recurrent = LAYERS
    capped, window = (
        dataclasses.replace(growing, mixer=dataclasses.replace(ATTENTION, **change))
        for change in ({"soft_cap": 5.0}, {"reach": 8})
    )
    config = dataclasses.replace(UNBOUNDED, layers=(growing, capped, window, recurrent))
    engine = make_sampler(twin, config=config).engine
    engine.reproducible = True
    capacity, rng = engine.capacity_for(700), np.random.default_rng(0)

    def state(length: int) -> Any:
        arrays = engine.to_numpy(engine.begin(1, capacity))
        return engine.from_numpy(
            {
                block: {
                    name: np.full_like(value, length)
                    if name == "num_tokens"
                    else rng.normal(size=value.shape).astype(value.dtype)
                    for name, value in fields.items()
                }
                for block, fields in arrays.items()
            }
        )

    states = {length: state(length) for length in (3, 400, 600)}

    def first_row(neighbour: int | None) -> list[Any]:
        cache = engine.put(engine.begin(2, capacity), np.array([0]), states[400])
        if neighbour is not None:
            cache = engine.put(cache, np.array([1]), states[neighbour])
        rows = []
        for step in range(2):
            position = [400 + step, -1 if neighbour is None else neighbour + step]
            fed = np.array([7 + step, 9], np.int32), np.array(position, np.int32)
            logits, cache = engine.feed(cache, *map(engine.on_device, fed))
            rows.append(engine.on_host(logits)[0])
        return rows

    alone = first_row(None)
    for neighbour in (3, 600, 400):
        np.testing.assert_array_equal(first_row(neighbour), alone, err_msg=str(neighbour))
