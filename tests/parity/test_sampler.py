"""Sampling, for both samplers; each known failure of the published ones has a test."""

import importlib
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm

from recurrentgemma.common.checkpoint import BUNDLED
from recurrentgemma.common.config import GriffinConfig
from recurrentgemma.common.sampler import PREFILL_CHUNK, prefill_lengths
from recurrentgemma.common.sampling import Categorical, Greedy
from recurrentgemma.common.text import apply_it_formatter

SUBMODULES = {"jax": "jax.numpy", "torch": "torch.nn"}
PROMPTS = ["In the beginning", "", "x", "It is a truth universally acknowledged, that a man"]
STEPS = 12
CONFIG = GriffinConfig(
    vocab_size=2048,
    width=32,
    mlp_expanded_width=48,
    num_heads=2,
    block_types=("recurrent", "recurrent", "attention"),  # pyright: ignore[reportArgumentType]
    embeddings_scale_by_sqrt_dim=True,
    attention_window_size=8,
    logits_soft_cap=30.0,
)


@pytest.fixture(params=["jax", "torch"])
def twin(request) -> str:
    pytest.importorskip(SUBMODULES[request.param], reason=f"{request.param} is not installed")
    return request.param


def make_sampler(twin: str, *, config: GriffinConfig = CONFIG, vocab=None, **kwargs):
    module = importlib.import_module(f"recurrentgemma.{twin}")
    if vocab is None:
        vocab = spm.SentencePieceProcessor(model_file=str(BUNDLED / "tokenizer.model"))
    if twin == "jax":
        params = module.init_params(config, seed=3)
        return module.Sampler(model=module.Griffin(config), vocab=vocab, params=params, **kwargs)
    model = module.Griffin(config)
    model.reset_parameters(seed=3)
    return module.Sampler(model=model, vocab=vocab, **kwargs)


def lists(tokens) -> list[list[int]]:
    return [np.asarray(row).tolist() for row in tokens]


def generate(sampler, prompts=PROMPTS, steps=STEPS, **kwargs) -> list[list[int]]:
    return lists(sampler(prompts, steps, **kwargs).tokens)


def without_eos(sampler, prompts=PROMPTS, steps=STEPS) -> list[list[int]]:
    return generate(sampler, prompts, steps, end_sampling_at_eos_token=False)


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


def test_logits_score_the_tokens(twin: str) -> None:
    sampler = make_sampler(twin)
    out = sampler(PROMPTS, STEPS, echo=True, return_logits=True, end_sampling_at_eos_token=False)
    plain = sampler(PROMPTS, STEPS, return_logits=True, end_sampling_at_eos_token=False)
    for row, prompt in enumerate(PROMPTS):
        length = len(sampler.tokenizer.encode(prompt))
        tokens, logits = np.asarray(out.tokens[row]), np.asarray(out.logits[row])
        assert logits.shape == (len(tokens), CONFIG.vocab_size)
        assert logits.dtype == np.float32
        assert (logits[0] == 0).all()
        np.testing.assert_array_equal(logits[length:].argmax(-1), tokens[length:])
        np.testing.assert_allclose(logits[length:], np.asarray(plain.logits[row]), atol=1e-5)
        # What scored the prompt's last token is what a prompt without it would draw from.
        if length > 2:
            shorter = sampler.tokenizer.vocab.decode(tokens[1 : length - 1].tolist())
            assert sampler.tokenizer.encode(shorter) == tokens[: length - 1].tolist()
            (alone,) = sampler([shorter], 1, return_logits=True).logits
            np.testing.assert_allclose(logits[length - 1], np.asarray(alone)[0], atol=1e-5)
    assert sampler(PROMPTS, 1).logits is None


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


def test_a_long_prompt_is_read_in_chunks(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make_sampler(twin)
    prompt = "And it came to pass " * 12
    whole = without_eos(sampler, [prompt, "x"])
    monkeypatch.setattr("recurrentgemma.common.sampler.PREFILL_CHUNK", 16)
    assert without_eos(sampler, [prompt, "x"]) == whole
    echoed = sampler([prompt, "x"], 2, echo=True, return_logits=True)
    monkeypatch.undo()
    expected = sampler([prompt, "x"], 2, echo=True, return_logits=True)
    for one, other in zip(echoed.logits, expected.logits, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-5)


def test_chunk_lengths() -> None:
    assert prefill_lengths(5, buckets=False) == [5]
    assert prefill_lengths(5, buckets=True) == [16]
    assert prefill_lengths(17, buckets=True) == [32]
    assert prefill_lengths(PREFILL_CHUNK, buckets=True) == [PREFILL_CHUNK]
    assert prefill_lengths(2 * PREFILL_CHUNK + 3, buckets=False) == [3] + 2 * [PREFILL_CHUNK]


def test_new_lengths_and_step_counts_compile_nothing() -> None:
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    from recurrentgemma.jax import sampler as module

    sampler = make_sampler("jax")
    sampler(["In the beginning"], 3)
    forward: Any = module._compiled_forward
    compiled = forward._cache_size()
    for steps in (1, 2, 7):
        for prompt in ("", "x", "He said", "And it came to pass in"):
            make_sampler("jax")([prompt], steps, end_sampling_at_eos_token=False)
    assert forward._cache_size() == compiled


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


def draw_many(twin: str, sampling: Categorical, logits: np.ndarray, count: int, dtype: str):
    """`count` independent draws from one row of logits."""
    sampler = make_sampler(twin, sampling=sampling)
    if twin == "jax":
        import jax.numpy as jnp

        rows = jnp.broadcast_to(jnp.asarray(logits, dtype), (count, len(logits)))
    else:
        import torch

        rows = torch.tensor(logits).to(getattr(torch, dtype)).expand(count, -1)
    return sampler._draw(rows, sampler._seed(0, count), 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_draws_follow_the_softmax(twin: str, dtype: str) -> None:
    """Chi-square over 4096 tokens in groups, the same seed every run."""
    size, count = 4096, 2048
    uniform = draw_many(twin, Categorical(), np.zeros(size), count, dtype)
    observed = np.histogram(uniform, bins=8, range=(0, size))[0]
    assert ((observed - count / 8) ** 2 / (count / 8)).sum() < 24.3  # p = 0.001, 7 degrees
    logits = np.linspace(0, 3, size).round(1)
    for temperature in (1.0, 0.5):
        drawn = draw_many(twin, Categorical(temperature), logits, count, dtype)
        rounded = np.asarray(logits, np.float32)
        if dtype == "bfloat16":
            bits = rounded.view(np.uint32)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
        p = np.exp(rounded / temperature)
        expected = count * (p / p.sum()).reshape(8, -1).sum(1)
        observed = np.histogram(drawn, bins=8, range=(0, size))[0]
        assert ((observed - expected) ** 2 / expected).sum() < 24.3


def kept(twin: str, sampling: Categorical, probabilities: list[float]) -> list[int]:
    module = importlib.import_module(f"recurrentgemma.{twin}.sampling")
    logits = np.log(np.asarray([probabilities], np.float32))
    if twin == "jax":
        import jax.numpy as jnp

        logits = jnp.asarray(logits)
    else:
        import torch

        logits = torch.from_numpy(logits)
    values, ids = module.cut_off(sampling, logits)
    finite = np.isfinite(np.asarray(values[0]))
    return (
        sorted(np.asarray(ids[0])[finite].tolist()) if ids is not None else list(range(len(finite)))
    )


def test_cut_offs_keep_the_right_tokens(twin: str) -> None:
    p = [0.1, 0.3, 0.2, 0.3, 0.1]
    assert kept(twin, Categorical(), p) == [0, 1, 2, 3, 4]
    assert kept(twin, Categorical(top_k=1), p) == [1]  # of equals the lowest id
    assert kept(twin, Categorical(top_k=3), p) == [1, 2, 3]
    assert kept(twin, Categorical(top_k=99), p) == [0, 1, 2, 3, 4]
    assert kept(twin, Categorical(top_p=0.25), p) == [1]
    assert kept(twin, Categorical(top_p=0.55), p) == [1, 3]
    assert kept(twin, Categorical(top_p=0.75), p) == [1, 2, 3]
    assert kept(twin, Categorical(top_p=1e-9), p) == [1]
    # top_p counts within what top_k keeps: 0.5, 0.5.
    assert kept(twin, Categorical(top_k=2, top_p=0.4), p) == [1]


def test_draws_respect_cut_offs(twin: str) -> None:
    logits = np.log(np.asarray([0.1, 0.3, 0.2, 0.3, 0.1]))
    drawn = draw_many(twin, Categorical(top_k=3), logits, 512, "float32")
    assert set(drawn.tolist()) == {1, 2, 3}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"top_k": 0}, "top_k must be a positive integer, got 0"),
        ({"top_k": 1.5}, "top_k must be a positive integer"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
    ],
)
def test_bad_strategies(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Categorical(**kwargs)


def test_bad_requests(twin: str) -> None:
    sampler = make_sampler(twin)
    with pytest.raises(ValueError, match="sequence of strings, got 'one prompt'"):
        sampler("one prompt", 3)
    with pytest.raises(ValueError, match="total_generation_steps must be an integer of at least 0"):
        sampler(PROMPTS, -1)
    with pytest.raises(ValueError, match="total_generation_steps must be an integer of at least 0"):
        sampler.stream("x", 1.5)
    small = make_sampler(twin, config=GriffinConfig(**{**CONFIG.__dict__, "vocab_size": 300}))
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
