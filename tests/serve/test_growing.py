"""A model whose state grows with the text: each slot has room for the longest text."""

from typing import Any

import numpy as np
from samplers import UNBOUNDED, lists, make_sampler

from recurrentgemma.common.generation.requests import RowRequest
from recurrentgemma.common.generation.stops import Stops
from recurrentgemma.common.generation.strategies import Greedy
from recurrentgemma.common.model.state import capacity_of
from recurrentgemma.serve.jobs import Growth, Job, PromptRead
from recurrentgemma.serve.scheduler import Scheduler
from recurrentgemma.serve.state_cache import StateCache


def test_kept_states_have_the_room_that_they_need(sampler) -> None:
    """They are cut when they are kept, and grown when they go on; the text stays the same."""
    name = type(sampler.engine).__module__.split(".")[1]
    growing = make_sampler(name, config=UNBOUNDED)
    engine, events = growing.engine, {}

    def deliver(pairs) -> None:
        for job, event in pairs:
            events.setdefault(job, []).append(event)

    capacity, states = engine.capacity_for(700), StateCache(1 << 24)
    scheduler = Scheduler(
        engine,
        growing.tokenizer,
        deliver,
        num_slots=1,
        capacity=capacity,
        states=states,
    )
    rng, row = np.random.default_rng(0), RowRequest(4, Greedy(), Stops({}, ()))
    tokens = rng.integers(5, UNBOUNDED.vocab_size, size=300).tolist()
    cached = []
    for length in (100, 300, 120):
        prompt = tokens[:length]
        job = Job(tuple(prompt), [row], marks=(length - 1,))
        scheduler.submit([job])
        while scheduler.busy:
            scheduler.turn()
        said = [t for event in events[job] if isinstance(event, Growth) for t in event.tokens]
        free: Any = {"end_sampling_at_eos_token": False}
        assert [said] == lists(growing([prompt], 4, **free).tokens)
        cached += [event.cached for event in events[job] if isinstance(event, PromptRead)]
    assert cached == [0, 99, 99]
    _, short = states.find("", tokens[:100])
    _, long = states.find("", tokens)
    assert [capacity_of(UNBOUNDED, state) for state in (short, long)] == [256, 512]
    assert capacity == 768
    assert states.nbytes < 5 * sum(v.nbytes for block in long.values() for v in block)
