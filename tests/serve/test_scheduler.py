"""Rows of many jobs in one running batch: each gets what the sampler gives it alone."""

import threading
from typing import Any

import numpy as np
import pytest
from samplers import PROMPTS, make_sampler
from scheduling import LONG, Served, alone, make_job

from recurrentgemma.common.generation.stops import Stops
from recurrentgemma.common.generation.strategies import Categorical, Greedy
from recurrentgemma.serve.jobs import Failed, Growth, Job, PromptRead
from recurrentgemma.serve.scheduler import FullError, StoppedError
from recurrentgemma.serve.state_cache import StateCache

STRATEGIES = [
    Greedy(),
    Categorical(1.5),
    Categorical(0.8, top_k=5),
    Categorical(1.2, top_p=0.9, min_p=0.01, repetition_penalty=1.3),
    Greedy(repetition_penalty=1.5, frequency_penalty=2.0, logit_bias={9: 1.5}),
]


def test_jobs_that_come_and_go_get_what_they_get_alone(sampler) -> None:
    served = Served(sampler)
    asked = []
    for seed, strategy in enumerate(STRATEGIES * 2):
        prompt = [*PROMPTS, LONG][seed % 5]
        steps = 3 + 5 * (seed % 3)
        job = make_job(sampler, prompt, steps, strategy, seed)
        asked.append((served.submit(job, turns=seed % 4), (prompt, steps, strategy, seed)))
    served.finish()
    for job, arguments in asked:
        assert served.tokens(job) == alone(sampler, *arguments)
        last = served.events[job][-1]
        assert (last.finish_reason, last.row) == ("length", 0)
    assert served.scheduler.slots.active == []


@pytest.mark.parametrize("burst", [1, 4])
def test_a_row_ends_at_its_stops(sampler, burst: int, monkeypatch) -> None:
    monkeypatch.setattr(sampler.engine, "burst", burst)
    (free,) = alone(sampler, "x", 30)
    text = sampler.tokenizer.decode(free)
    served = Served(sampler)
    jobs = []
    for stops in (Stops({free[6]: "stop_id"}, ()), Stops({}, (text[9:12],)), Stops({}, ())):
        job = make_job(sampler, "x", 30)
        jobs.append(served.submit(Job(job.tokens, [job.rows[0]._replace(stops=stops)])))
    served.finish()
    by_id, by_string, whole = ([e for e in served.events[job] if isinstance(e, Growth)]
                               for job in jobs)  # fmt: skip
    assert by_id[-1].finish_reason == "stop_id"
    assert sum(len(piece.tokens) for piece in by_id) == free.index(free[6]) + 1
    assert by_string[-1].finish_reason == "stop_string"
    assert "".join(piece.text for piece in by_string) == text[: text.find(text[9:12])]
    assert [t for piece in whole for t in piece.tokens] == free
    assert "".join(piece.text for piece in whole) == text


def test_a_seed_draws_the_same_alone_and_among_31(sampler) -> None:
    served, hot = Served(sampler), Categorical(1.5)
    prompts = [*PROMPTS, LONG, "y", "z", "Emma was"]
    jobs = [
        served.submit(make_job(sampler, prompts[seed % 8], 6, hot, seed), turns=seed % 2)
        for seed in range(32)
    ]
    served.finish()
    for seed in (0, 13, 28, 31):
        assert served.tokens(jobs[seed]) == alone(sampler, prompts[seed % 8], 6, hot, seed)


def test_samples_read_the_prompt_once(sampler) -> None:
    served = Served(sampler, num_slots=1)
    hot = Categorical(1.5)
    job = served.submit(make_job(sampler, LONG, 6, hot, 5, samples=4))
    served.finish()
    assert served.tokens(job) == alone(sampler, LONG, 6, hot, 5, samples=4)
    assert served.scheduler.counts.prompt_tokens == len(job.tokens) - 1
    assert sum(isinstance(event, PromptRead) for event in served.events[job]) == 1


def test_a_cancelled_job_frees_its_slot_in_a_turn(sampler) -> None:
    served = Served(sampler, num_slots=1)
    one, other, third = (served.submit(make_job(sampler, p, 40)) for p in ("x", LONG, "y"))
    served.turn(4)
    before = len(served.tokens(one)[0])
    assert before
    one.cancelled = other.cancelled = True
    served.turn(1)
    assert [row.job for row in served.scheduler.slots.active] == [third]
    served.finish()
    assert len(served.tokens(one)[0]) == before
    assert served.tokens(third) == alone(sampler, "y", 40)


def test_the_lower_number_goes_first_and_the_other_comes_back(sampler) -> None:
    served = Served(sampler, num_slots=1, reproducible=True)
    hot = Categorical(1.3)
    late = served.submit(make_job(sampler, "x", 20, hot, 1, priority=1), turns=6)
    urgent = served.submit(make_job(sampler, "y", 5, priority=-1), turns=1)
    assert [row.job for row in served.scheduler.slots.active] == [urgent]
    served.finish()
    assert served.scheduler.counts.preemptions == 1
    assert served.tokens(urgent) == alone(sampler, "y", 5)
    assert served.tokens(late) == alone(sampler, "x", 20, hot, 1)


def test_no_bit_depends_on_neighbours(sampler) -> None:
    """Log-probabilities are equal to the bit: alone, beside others, preempted and put back.

    So they are where the beginning of the prompt is kept, cut at any place.
    """
    states, tokens = StateCache(1 << 24), tuple(sampler.tokenizer.encode(LONG * 3))

    def logprobs(crowded: bool, states: StateCache | None = None, mark: int = 0) -> list[float]:
        served = Served(sampler, reproducible=True, states=states)
        if crowded:
            served.submit(make_job(sampler, "y", 9, Categorical(1.2), 3), turns=2)
        asked = make_job(sampler, LONG, 12).rows
        marks = (mark, len(tokens) - 1)
        job = Job(tokens, asked, num_logprobs=1, marks=marks, priority=1)
        served.submit(job, turns=12 if states is None else 4)
        if crowded:
            for prompt in ("x", LONG, "", "z"):
                served.submit(make_job(sampler, prompt, 12), turns=1)
        served.finish()
        assert (served.scheduler.counts.preemptions > 0) == crowded
        assert (served.scheduler.counts.cached_tokens > 0) == (states is not None)
        pieces = [event for event in served.events[job] if isinstance(event, Growth)]
        return [scores.chosen for piece in pieces for scores in piece.logprobs or ()]

    cold = logprobs(False)
    assert len(cold) == 12
    assert logprobs(True) == cold
    for mark in (101, 0, 70):  # a state after 96 tokens, then the one at the end of the prompt
        other = tokens[: mark + 1] + (7,) * 9
        served = Served(sampler, reproducible=True, states=states)
        served.submit(Job(other, make_job(sampler, "x").rows, marks=(mark,), scored=mark == 70))
        served.finish()
        assert logprobs(mark == 101, states, mark) == cold
    assert len(states) > 1  # states of beginnings alone: no reply is kept
    assert all(len(node.edge) % 32 in (0, 1) for node in states._used)


def test_nothing_compiles_once_the_scheduler_is_ready() -> None:
    """For 50 jobs of any length and strategy, with kept states, scores and samples."""
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    import jax

    compiled = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        here = threading.current_thread() is threading.main_thread()  # not a server's
        if here and event.endswith("backend_compile_duration"):
            compiled.append(event)

    sampler = make_sampler("jax")  # not one whose programs were dropped since it was prepared
    served = Served(sampler, states=StateCache(1 << 20), hold_s=1e9)
    served.scheduler.prepare()
    rng = np.random.default_rng(0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for number in range(50):
            prompt = LONG[: int(rng.integers(0, len(LONG)))]
            options: Any = {"num_logprobs": number % 3} if number % 5 == 0 else {}
            strategy = STRATEGIES[number % len(STRATEGIES)]
            job = make_job(sampler, prompt, 1 + number % 4, strategy, number, 1 + number % 3)
            marks = (int(rng.integers(0, len(job.tokens))), len(job.tokens) - 1)
            scored = number % 10 == 0
            job = Job(job.tokens, job.rows, marks=marks, scored=scored, **options)
            served.submit(job, turns=int(rng.integers(0, 3)))
        served.finish()
        assert compiled == []
        jax.jit(lambda x: x + 3)(np.ones(17)).block_until_ready()
        assert len(compiled) == 1  # what was never compiled is noticed
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_prompt_is_scored(sampler) -> None:
    served = Served(sampler)
    job = served.submit(make_job(sampler, LONG, 1, num_logprobs=2, scored=True))
    only = served.submit(Job(job.tokens, [], num_logprobs=0, scored=True))
    short = served.submit(Job(job.tokens[:1], [], num_logprobs=0, scored=True))
    served.finish()
    (expected,) = sampler.score([LONG])
    for scored in (job, only):
        scores = served.events[scored][0].scores
        np.testing.assert_allclose(scores.chosen, expected.logprobs, atol=1e-5)
    scores = served.events[job][0].scores
    assert scores.top.shape == (len(job.tokens) - 1, 2)
    is_top = scores.top_tokens[:, 0] == job.tokens[1:]
    np.testing.assert_allclose(scores.top[is_top, 0], scores.chosen[is_top], atol=1e-5)
    assert served.events[short][0].scores.chosen.shape == (0,)
    assert served.tokens(job) == alone(sampler, LONG, 1)


def test_kept_states_give_what_cold_prompts_give(sampler) -> None:
    served = Served(sampler, states=StateCache(1 << 24))
    tokens = tuple(sampler.tokenizer.encode(LONG * 2))
    row = make_job(sampler, "", 9).rows[0]
    rng = np.random.default_rng(0)
    job = Job(tokens, [row])
    for _ in range(12):
        length = int(rng.integers(70, len(tokens)))
        changed = tokens[:length] + (5,) * int(rng.integers(1, 4))
        marks = (int(rng.integers(64, length)), len(changed) - 1)
        job = served.submit(Job(changed, [row], marks=marks), turns=int(rng.integers(0, 3)))
        cold = Served(sampler)
        expected = cold.submit(Job(changed, [row]))
        served.finish()
        cold.finish()
        assert served.tokens(job) == cold.tokens(expected)
    assert served.scheduler.counts.cached_tokens > 300
    # The same prompt again reads nothing but its last token; another key's reads all.
    before = served.scheduler.counts.prompt_tokens
    again = served.submit(Job(job.tokens, [row], marks=job.marks))
    served.finish()
    assert served.scheduler.counts.prompt_tokens == before
    assert served.events[again][0].cached == len(job.tokens) - 1
    other = served.submit(Job(job.tokens, [row], marks=job.marks, salt="another"))
    served.finish()
    assert served.events[other][0].cached == 0


def test_a_reply_is_kept_where_its_text_spells_it(sampler) -> None:
    served = Served(sampler, states=StateCache(1 << 24))
    job = make_job(sampler, LONG, 20)
    served.submit(Job(job.tokens, job.rows, marks=(len(job.tokens) - 1,)))
    served.finish()
    (first,) = served.events.values()
    said = [t for event in first if isinstance(event, Growth) for t in event.tokens]
    text = sampler.tokenizer.decode(said)
    spelled = sampler.tokenizer.encode(text)[1:]
    expected = len(job.tokens) + 19 if spelled == said else len(job.tokens) - 1
    later = served.submit(Job((*job.tokens, *said, 9), job.rows))
    served.finish()
    assert served.events[later][0].cached == expected


def test_a_full_queue_and_a_broken_engine(sampler, monkeypatch, caplog) -> None:
    served = Served(sampler, num_slots=1, most_waiting=2)
    jobs = [served.submit(make_job(sampler, "x", 3)) for _ in range(3)]
    with pytest.raises(FullError, match="at most 2 prompts may wait, and 3 do"):
        served.submit(make_job(sampler, "x", 3))

    def broken(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sampler.engine, "prefill", broken)
    monkeypatch.setattr(sampler.engine, "feed", broken)
    served.scheduler.start()
    served.scheduler.close()
    assert "the engine has stopped" in caplog.text
    assert all(isinstance(served.events[job][-1], Failed) for job in jobs)
    assert str(served.scheduler.error) == "out of memory"
    with pytest.raises(StoppedError):
        served.submit(make_job(sampler, "x", 3))
