"""Rows of one batch that ask for different things: each gets what it gets alone."""

from typing import Any

import numpy as np
import pytest
from samplers import CONFIG, PROMPTS, STEPS, generate, lists, make_sampler, sampling_function
from sweeps import sweep

from recurrentgemma.common.generation.requests import RowRequest
from recurrentgemma.common.generation.settings import row_settings, variant_of
from recurrentgemma.common.generation.stops import Stops
from recurrentgemma.common.generation.strategies import (
    Categorical,
    Greedy,
    Sampling,
    row_keys,
    uniform,
)

FREE: dict[str, Any] = {"end_sampling_at_eos_token": False}
MIXED = [
    Greedy(),
    Categorical(1.5),
    Categorical(0.8, top_k=5),
    Categorical(1.2, top_p=0.9, min_p=0.01, repetition_penalty=1.3),
]
SEEDS = [11, 12, 13, 14]


def test_a_batch_mixes_strategies(twin: str) -> None:
    sampler = make_sampler(twin)
    batch = generate(sampler, sampling=MIXED, rng=SEEDS, **FREE)
    assert len({tuple(row) for row in batch}) == 4
    for prompt, strategy, seed, row in zip(PROMPTS, MIXED, SEEDS, batch, strict=True):
        assert generate(sampler, [prompt], sampling=strategy, rng=[seed], **FREE) == [row]
    out = sampler.generate(sampler.prefill(PROMPTS), STEPS, sampling=MIXED, rng=SEEDS, **FREE)
    assert lists(out.tokens) == batch
    # Samples of a prompt share its strategy.
    asked: Any = {"sampling": MIXED[:2], "rng": SEEDS[:2], "num_samples": 2}
    several = generate(sampler, PROMPTS[:2], **asked, **FREE)
    assert several[::2] == batch[:2]
    assert several[0] == several[1]
    assert several[2] != several[3]


def test_a_batch_mixes_lengths_and_stops(twin: str) -> None:
    sampler = make_sampler(twin, sampling=Categorical(1.5))
    whole = sampler(PROMPTS, STEPS, rng=SEEDS, **FREE)
    free = lists(whole.tokens)
    stops = [[free[0][3]], [], [free[2][5], free[2][7]], []]
    strings = [[], [whole.text[1][9:12]], [], [whole.text[3] + "\0"]]
    steps = [STEPS, STEPS, STEPS, 5]
    out = sampler(PROMPTS, steps, rng=SEEDS, stop_ids=stops, stop_strings=strings, **FREE)
    for row, (prompt, limit) in enumerate(zip(PROMPTS, steps, strict=True)):
        asked: Any = {"stop_ids": stops[row], "stop_strings": strings[row], "rng": [SEEDS[row]]}
        alone = sampler([prompt], limit, **asked, **FREE)
        assert lists(alone.tokens)[0] == lists(out.tokens)[row]
        assert alone.text == [out.text[row]]
        assert alone.finish_reasons == [out.finish_reasons[row]]
    assert out.finish_reasons == ["stop_id", "stop_string", "stop_id", "length"]
    assert [len(row) for row in out.tokens][::2] == [4, 6]
    assert len(out.tokens[3]) == 5
    none = sampler(PROMPTS, [0, 1, 0, 2], return_logits=True, **FREE)
    assert [len(row) for row in none.tokens] == [len(row) for row in none.logits] == [0, 1, 0, 2]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"total_generation_steps": [1, 2, 3]},
        {"sampling": [Greedy()]},
        {"stop_ids": [[1], [2], [3]]},
        {"stop_strings": [["a"], ["b"], ["c"]]},
    ],
)
def test_one_a_prompt_means_one_a_prompt(twin: str, kwargs: dict[str, Any]) -> None:
    name = next(iter(kwargs))
    with pytest.raises(ValueError, match=f"{name} must be one for all prompts or one a prompt, 2"):
        make_sampler(twin)(PROMPTS[:2], **{"total_generation_steps": 1} | kwargs)


def test_a_neighbour_changes_no_draw(twin: str) -> None:
    """To the bit: whatever the width that the batch sorts, and whether a row draws from all."""
    size, count = sweep(1500, 3000), 64
    engine = make_sampler(twin).engine
    draw = sampling_function(twin, "draw", 0)
    logits = np.random.default_rng(0).normal(scale=3, size=(count, size)).astype(np.float32)
    numbers = uniform(row_keys(0, count), np.arange(count))[0]

    def drawn(strategy: Sampling, other: Sampling) -> np.ndarray:
        """What rows draw, for many numbers, each behind a neighbour."""
        rows = [RowRequest(1, each, Stops({}, ())) for each in (other, strategy)] * count
        arguments = (row_settings(rows, size), np.repeat(logits, 2, 0), np.repeat(numbers, 2))
        settings, z, u = map(engine.on_device, arguments)
        return np.asarray(draw(variant_of(rows, size, None, False), settings, z, u))[1::2]

    for strategy in (Categorical(0.9, top_k=40, top_p=0.9), Categorical(1.3), Greedy()):
        alone = drawn(strategy, strategy)
        for other in (Greedy(), Categorical(2.0), Categorical(top_p=0.99), Categorical(top_k=900)):
            np.testing.assert_array_equal(drawn(strategy, other), alone)


def test_other_values_compile_nothing() -> None:
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    import jax

    compiled = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    sampler = make_sampler("jax")

    def strategy(temperature: float, k: int, p: float, penalty: float) -> list[Sampling]:
        return [Categorical(temperature, top_k=k, min_p=p, repetition_penalty=penalty),
                Categorical(temperature)]  # fmt: skip

    first = strategy(1.0, 40, 0.1, 1.2)
    sampler(["x", "y"], 6, sampling=first, rng=1, stop_ids=[5])
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for place, (temperature, k, p) in enumerate(((0.3, 7, 0.2), (2.5, 64, 0.01), (1.0, 1, 0))):
            values = strategy(temperature, k, p, 1.1 + place)
            sampler(["z", "word"], [3 + place, 5], sampling=values, rng=place, stop_ids=[7, place])
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_shape_of_a_batch_alone_chooses_what_is_compiled() -> None:
    def variant(*strategies: Sampling) -> tuple[bool, int, bool]:
        rows = [RowRequest(1, strategy, Stops({}, ())) for strategy in strategies]
        return variant_of(rows, CONFIG.vocab_size, None, False)[:3]

    assert variant(Greedy()) == (False, 0, False)
    assert variant(Greedy(), Categorical(0.5)) == (True, 0, False)
    assert variant(Categorical(top_k=1)) == variant(Categorical(top_k=64)) == (False, 64, False)
    assert variant(Categorical(top_k=65), Categorical()) == (True, 256, False)
    assert variant(Categorical(top_p=0.5), Greedy(1.1)) == (False, CONFIG.vocab_size, True)
