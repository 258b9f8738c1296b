"""Sampling, for both samplers; each known failure of the published ones has a test."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from samplers import (
    CONFIG,
    PROMPTS,
    STEPS,
    SUBMODULES,
    generate,
    lists,
    make_sampler,
    without_eos,
)
from sweeps import sweep

from recurrentgemma.common.generation.chunks import chunk_lengths
from recurrentgemma.common.generation.strategies import Categorical, Greedy
from recurrentgemma.common.tokenizer import apply_it_formatter


@pytest.fixture(params=["jax", "torch"])
def twin(request) -> str:
    pytest.importorskip(SUBMODULES[request.param], reason=f"{request.param} is not installed")
    return request.param


def test_both_twins_generate_the_same() -> None:
    for submodule in SUBMODULES.values():
        pytest.importorskip(submodule, reason="parity needs both frameworks")
    assert without_eos(make_sampler("jax")) == without_eos(make_sampler("torch"))


def test_a_batch_generates_what_each_row_does_alone(twin: str) -> None:
    sampler = make_sampler(twin)
    batch = without_eos(sampler)
    assert batch == [without_eos(sampler, [prompt])[0] for prompt in PROMPTS]
    assert [len(row) for row in batch] == [STEPS] * len(PROMPTS)


def test_each_row_ends_at_its_own_eos(twin: str) -> None:
    sampler = make_sampler(twin)
    free = without_eos(sampler)
    # Whatever row 0 says fourth plays the part of EOS.
    sampler.tokenizer.eos_id = free[0][3]
    expected = []
    for row in free:
        end = row.index(free[0][3]) + 1 if free[0][3] in row else STEPS
        expected.append(row[:end])
    assert len(expected[0]) <= 4
    assert any(len(row) == STEPS for row in expected)
    assert generate(sampler) == expected
    assert without_eos(sampler) == free


def test_an_eos_drawn_first_ends_the_row(twin: str) -> None:
    sampler = make_sampler(twin)
    first = without_eos(sampler)[2][0]
    sampler.tokenizer.eos_id = first
    out = sampler([PROMPTS[2]], STEPS)
    assert lists(out.tokens) == [[first]]
    assert out.text == [""]


def test_an_instruction_tuned_model_ends_at_end_of_turn(twin: str) -> None:
    sampler = make_sampler(twin, is_it_model=True)
    plain = make_sampler(twin)
    free = without_eos(sampler, ["Hello"])
    # The prompt was put into the template.
    assert free == without_eos(plain, [apply_it_formatter("Hello")])
    sampler.tokenizer.end_of_turn_id = free[0][2]
    end = free[0].index(free[0][2]) + 1
    assert generate(sampler, ["Hello"]) == [free[0][:end]]
    plain.tokenizer.end_of_turn_id = free[0][2]
    assert len(generate(plain, [apply_it_formatter("Hello")])[0]) > end


def test_echo_returns_the_prompt_and_nothing_is_lost_without_it(twin: str) -> None:
    sampler = make_sampler(twin)
    prompts = [sampler.tokenizer.encode(prompt) for prompt in PROMPTS]
    echoed = generate(sampler, echo=True, end_sampling_at_eos_token=False)
    assert echoed == [p + g for p, g in zip(prompts, without_eos(sampler), strict=True)]
    out = sampler(PROMPTS, 0, echo=True)
    assert lists(out.tokens) == prompts
    assert out.text == PROMPTS


def test_logits_chose_the_tokens_and_follow_the_prompt_s(twin: str) -> None:
    sampler = make_sampler(twin)
    out = sampler(PROMPTS, STEPS, echo=True, return_logits=True, end_sampling_at_eos_token=False)
    plain = sampler(PROMPTS, STEPS, return_logits=True, end_sampling_at_eos_token=False)
    for row, prompt in enumerate(PROMPTS):
        length = len(sampler.tokenizer.encode(prompt))
        tokens, logits = np.asarray(out.tokens[row]), np.asarray(out.logits[row])
        assert logits.shape == (len(tokens), CONFIG.vocab_size)
        assert logits.dtype == np.float32
        # After the prompt's last token comes what chose the first token after it.
        np.testing.assert_allclose(logits[length - 1], logits[length], atol=1e-5)
        np.testing.assert_array_equal(logits[length:].argmax(-1), tokens[length:])
        np.testing.assert_allclose(logits[length:], np.asarray(plain.logits[row]), atol=1e-5)
        # Before the prompt's last token comes what a prompt without it would draw from.
        if length > 2:
            shorter = sampler.tokenizer.vocab.decode(tokens[1 : length - 1].tolist())
            assert sampler.tokenizer.encode(shorter) == tokens[: length - 1].tolist()
            (alone,) = sampler([shorter], 1, return_logits=True).logits
            np.testing.assert_allclose(logits[length - 2], np.asarray(alone)[0], atol=1e-5)
    assert sampler(PROMPTS, 1).logits == []


def test_no_steps_and_no_prompts(twin: str) -> None:
    sampler = make_sampler(twin)
    assert generate(sampler, steps=0) == [[]] * len(PROMPTS)
    out = sampler(PROMPTS, 0, return_logits=True)
    assert [rows.shape for rows in out.logits] == [(0, CONFIG.vocab_size)] * len(PROMPTS)
    assert sampler([], 5).text == []


def test_streaming_yields_the_same_text(twin: str) -> None:
    sampler = make_sampler(twin)
    for prompt in PROMPTS:
        out = sampler([prompt], 40, end_sampling_at_eos_token=False)
        pieces = list(sampler.stream(prompt, 40, end_sampling_at_eos_token=False))
        assert [token for token, _ in pieces] == lists(out.tokens)[0]
        assert "".join(text for _, text in pieces) == out.text[0]
    assert list(sampler.stream("x", 0)) == []


def test_a_long_prompt_is_read_in_chunks(twin: str) -> None:
    sampler = make_sampler(twin)
    prompt = "And it came to pass " * 12
    whole = without_eos(sampler, [prompt, "x"])
    kwargs: dict[str, Any] = {"echo": True, "return_logits": True}
    expected = sampler([prompt, "x"], 2, **kwargs)
    for chunks in sweep(((24, 12, 3), (1,)), ((16,), (32, 8), (24, 12, 3), (1,))):
        sampler = make_sampler(twin)
        sampler.engine.prefill_chunks = sampler.engine.score_chunks = chunks
        assert without_eos(sampler, [prompt, "x"]) == whole
    echoed = sampler([prompt, "x"], 2, **kwargs)
    for one, other in zip(echoed.logits, expected.logits, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-5)


def test_chunk_lengths() -> None:
    sizes = (2048, 256, 32)
    assert chunk_lengths(0, sizes, pad=True) == chunk_lengths(0, sizes, pad=False) == []
    assert chunk_lengths(5, sizes, pad=False) == [5]
    assert chunk_lengths(5, sizes, pad=True) == [32]
    assert chunk_lengths(33, sizes, pad=True) == [32, 32]
    assert chunk_lengths(250, sizes, pad=True) == [256]
    assert chunk_lengths(600, sizes, pad=True) == [32, 32, 32, 256, 256]
    assert chunk_lengths(2 * 2048 + 3, sizes, pad=True) == [32, 2048, 2048]
    assert chunk_lengths(2 * 2048 + 3, sizes, pad=False) == [3, 2048, 2048]
    for length in range(0, 5000, 37):
        chunks = chunk_lengths(length, sizes, pad=True)
        assert length <= sum(chunks) < length + 32
        assert len(chunks) <= 2 + 7 + 7


@pytest.mark.parametrize("rng", ["integer", "own"])
def test_a_seed_reproduces_and_a_row_draws_by_itself(twin: str, rng: str) -> None:
    sampler = make_sampler(twin, sampling=Categorical(temperature=1.5))

    def seed(number: int):
        if rng == "integer":
            return number
        if twin == "jax":
            import jax

            return jax.random.key(number)
        import torch

        return torch.Generator().manual_seed(number)

    kwargs = {"end_sampling_at_eos_token": False}
    first = generate(sampler, rng=seed(1), **kwargs)
    assert first == generate(sampler, rng=seed(1), **kwargs)
    assert first != generate(sampler, rng=seed(2), **kwargs)
    assert first[:1] == generate(sampler, PROMPTS[:1], rng=seed(1), **kwargs)
    same_prompt = generate(sampler, [PROMPTS[0]] * 2, rng=seed(1), **kwargs)
    assert same_prompt[0] != same_prompt[1]
    unseeded = [generate(sampler, PROMPTS[:1], **kwargs) for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_the_published_switch_draws() -> None:
    for twin, switch in (("jax", "deterministic_sampling"), ("torch", "greedy_sampling")):
        pytest.importorskip(SUBMODULES[twin], reason=f"{twin} is not installed")
        assert make_sampler(twin).sampling == Greedy()
        options: dict[str, Any] = {switch: False}
        assert make_sampler(twin, **options).sampling == Categorical()


def test_bad_requests(twin: str) -> None:
    sampler = make_sampler(twin)
    with pytest.raises(ValueError, match=r"sequence of texts, .* got 'one prompt'"):
        sampler("one prompt", 3)
    with pytest.raises(ValueError, match="total_generation_steps must be an integer of at least 0"):
        sampler(PROMPTS, -1)
    with pytest.raises(ValueError, match="total_generation_steps must be an integer of at least 0"):
        sampler.stream("x", 1.5)
    small = make_sampler(twin, config=dataclasses.replace(CONFIG, vocab_size=300))
    with pytest.raises(
        ValueError, match="prompt 1 has tokens outside the model's vocabulary of 300"
    ):
        small(["", "universally"], 3)


def test_prompts_may_come_from_a_generator(twin: str) -> None:
    sampler = make_sampler(twin)
    assert generate(sampler, (prompt for prompt in PROMPTS)) == generate(sampler)


def test_large_and_negative_seeds_count(twin: str) -> None:
    sampler = make_sampler(twin, sampling=Categorical(temperature=1.5))
    drawn = [generate(sampler, PROMPTS[:1], rng=seed)[0] for seed in (0, 2**40, 2**70, -1, 1)]
    assert len({tuple(tokens) for tokens in drawn}) == len(drawn)
