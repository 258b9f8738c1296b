"""Several tokens between two looks from the host: texts, stops and states are those of one."""

from typing import Any

import numpy as np
import pytest
from samplers import PROMPTS, generate, lists, make_sampler
from sweeps import sweep

from recurrentgemma.common.generation import loop
from recurrentgemma.common.generation.strategies import Categorical, Greedy

FREE: dict[str, Any] = {"end_sampling_at_eos_token": False}
HOT: dict[str, Any] = {"sampling": Categorical(1.5), "rng": 5} | FREE
LONG = 23  # one token, five bursts of four, two tokens


def burst_sampler(twin: str, burst: int = 4, **kwargs):
    sampler = make_sampler(twin, **kwargs)
    sampler.engine.burst = burst
    return sampler


@pytest.fixture
def pair(twin: str):
    """Samplers that look at every token, and at every fourth."""
    return burst_sampler(twin, 1), burst_sampler(twin)


def check_same(one, other, sampler) -> None:
    assert lists(other.tokens) == lists(one.tokens)
    assert other.text == one.text
    assert other.finish_reasons == one.finish_reasons
    np.testing.assert_array_equal(other.state.seen, one.state.seen)
    assert other.state.num_tokens == one.state.num_tokens
    # Once the pending tokens are read, the states are the same arrays.
    read = [sampler.prefill([""] * 4, out.state) for out in (one, other)]
    assert read[0].pending == read[1].pending
    arrays, others = (sampler.engine.to_numpy(state.cache) for state in read)
    for block, fields in arrays.items():
        for field, value in fields.items():
            np.testing.assert_allclose(others[block][field], value, atol=1e-5)
    more = [sampler.generate(out.state, 6, **HOT) for out in (one, other)]
    assert lists(more[0].tokens) == lists(more[1].tokens)


def test_bursts_generate_the_same(pair) -> None:
    sampling = [Greedy(), Categorical(1.5), Categorical(0.8, top_k=9), Greedy(1.4)]
    one, other = (
        sampler.generate(sampler.prefill(PROMPTS), LONG, sampling=sampling, rng=5, num_logprobs=2,
                         return_logits=True, **FREE)
        for sampler in pair
    )  # fmt: skip
    check_same(one, other, pair[0])
    for expected, logits in zip(one.logits, other.logits, strict=True):
        np.testing.assert_allclose(np.asarray(logits), np.asarray(expected), atol=1e-4)
    for expected, logprobs in zip(one.logprobs, other.logprobs, strict=True):
        np.testing.assert_allclose(logprobs.chosen, expected.chosen, atol=1e-5)
        np.testing.assert_array_equal(logprobs.top_tokens, expected.top_tokens)


def test_long_texts_go_in_long_bursts(twin: str, monkeypatch) -> None:
    """Where compiling a burst pays only for long texts, shorter ones go token by token."""
    monkeypatch.setattr(loop, "LONG", LONG)
    sampler = burst_sampler(twin, 1)
    sampler.engine.long_burst = 4
    sizes: list[int] = []

    def decode(*args):
        sizes.append(len(args[-1]))
        return type(sampler.engine).decode(sampler.engine, *args)

    monkeypatch.setattr(sampler.engine, "decode", decode)
    for steps in (LONG - 1, LONG):
        generate(sampler, PROMPTS, steps, **FREE)
    assert sizes == [1] * (LONG - 1) + [1, 4, 4, 4, 4, 4, 1, 1]


PLACES = (0, 1, 2, 3, 4, 6, 20, 22)  # each is the end of a row by an id, a string or a length
ENDS = [(0, 1, 2), (4, 3, 6), (20, 22, 0), (3, 4, 22)]


@pytest.mark.parametrize(
    ("by_id", "by_string", "length"), sweep(ENDS, [(place,) * 3 for place in PLACES] + ENDS)
)
def test_rows_stop_within_a_burst(pair, by_id: int, by_string: int, length: int) -> None:
    """At ids, at strings, and at lengths of their own; what was decoded too far is dropped."""
    tokens = generate(pair[0], PROMPTS, LONG, **HOT)
    assert len(set(tokens[0])) > 15
    part = pair[0].tokenizer.decode(tokens[1][: by_string + 1])[-4:]
    asked = {
        "stop_ids": [[tokens[0][by_id]], [], [], []],
        "stop_strings": [[], [part], [], []],
        **HOT,
    }
    steps = [LONG, LONG, length, LONG]
    one, other = (s.generate(s.prefill(PROMPTS), steps, **asked) for s in pair)
    check_same(one, other, pair[0])


def test_a_stream_is_the_same_at_every_token(twin: str) -> None:
    one, other = burst_sampler(twin, 1), burst_sampler(twin)
    streams = [sampler.stream("In the", 12, num_logprobs=1, **HOT) for sampler in (one, other)]
    whole = generate(one, ["In the"], 20, **HOT)[0]
    for place, (first, second) in enumerate(zip(*streams, strict=True)):
        assert second == first
        np.testing.assert_allclose(
            streams[1].logprobs.chosen, streams[0].logprobs.chosen, atol=1e-5
        )
        assert streams[1].tokens == tuple(whole[: place + 1])
        if place in (0, 2, 4, 8, 11):
            state = streams[1].state
            assert state.num_tokens == streams[0].state.num_tokens
            rest = other.generate(state, 20 - place - 1, **HOT)
            assert lists(rest.tokens) == [whole[place + 1 :]]
    assert [stream.finish_reason for stream in streams] == ["length"] * 2


def test_ctrl_c_within_a_burst(twin: str) -> None:
    sampler = burst_sampler(twin)
    whole = generate(sampler, ["In the beginning"], 14, **HOT)[0]
    decode, calls = sampler.engine.decode, []

    def interrupted(*args):
        result = decode(*args)
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return result

    sampler.engine.decode = interrupted
    stream = sampler.stream("In the beginning", 14, **HOT)
    got = []
    with pytest.raises(KeyboardInterrupt):
        got.extend(token for token, _ in stream)
    sampler.engine.decode = decode
    assert got == whole[:5]
    assert stream.state.lengths[0] > 1  # what was read before is not read again
    rest = sampler.generate(stream.state, 9, **HOT)
    assert got + lists(rest.tokens)[0] == whole


def test_a_burst_is_compiled_once() -> None:
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    sampler = burst_sampler("jax")
    sampler(["x"], 6, sampling=Categorical(1.1), rng=1)
    burst = sampler.engine._functions.burst
    count = burst._cache_size()
    for steps in (5, 6, 13, 40):
        sampler(["y"], steps, sampling=Categorical(0.1 * steps), rng=steps, stop_ids=[steps])
    assert burst._cache_size() == count
