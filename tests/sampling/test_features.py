"""Several samples, stops, log-probabilities, streams and their end, scores, in both twins."""

import contextlib
import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from samplers import PROMPTS, STEPS, SUBMODULES, generate, lists, make_sampler, saying, without_eos
from sweeps import sweep

from recurrentgemma.common.generation.prefill import scored
from recurrentgemma.common.generation.strategies import Categorical, Greedy

HOT = Categorical(temperature=1.5)
FREE: dict[str, Any] = {"end_sampling_at_eos_token": False}


def test_greedy_batches_of_ragged_prompts_over_every_split(twin: str) -> None:
    """A batch of 8 equals each alone, for many windows, however prompts are cut into chunks."""
    steps = sweep(32, 256)
    prompts = [*PROMPTS, "And", "He said to them, ", "Emma Woodhouse, handsome, clever", "ab " * 30]
    sampler = make_sampler(twin)
    batch = without_eos(sampler, prompts, steps)
    assert [len(row) for row in batch] == [steps] * 8
    for prompt, row in zip(prompts, batch, strict=True):
        assert without_eos(sampler, [prompt], steps) == [row]
    for chunks in ((1,), (8,), (40, 5)):
        sampler = make_sampler(twin)
        sampler.engine.prefill_chunks = chunks
        assert without_eos(sampler, prompts, steps) == batch
    if twin == "torch":
        pytest.importorskip(SUBMODULES["jax"], reason="parity needs both frameworks")
        assert without_eos(make_sampler("jax"), prompts, steps) == batch


# ------------------------------------------------------------------------------------ draws


def test_draws_do_not_depend_on_place_or_neighbours(twin: str) -> None:
    sampler = make_sampler(twin, sampling=HOT)
    seeds = [11, 12, 13, 14]
    batch = generate(sampler, rng=seeds, **FREE)
    turned = generate(sampler, PROMPTS[::-1], rng=seeds[::-1], **FREE)
    assert turned[::-1] == batch
    for prompt, seed, row in zip(PROMPTS, seeds, batch, strict=True):
        assert generate(sampler, [prompt], rng=[seed], **FREE) == [row]


def test_seeds_come_in_arrays_of_any_framework(twin: str) -> None:
    sampler = make_sampler(twin, sampling=HOT)
    one, several = (generate(sampler, PROMPTS[:2], 5, rng=rng, **FREE) for rng in (3, [3, 4]))
    for make in array_makers():
        assert generate(sampler, PROMPTS[:2], 5, rng=make(3), **FREE) == one
        assert generate(sampler, PROMPTS[:2], 5, rng=make([3, 4]), **FREE) == several
        assert generate(sampler, PROMPTS[:2], 5, rng=[make(3), make(4)], **FREE) == several
        for bad in (make([0.5, 1.5]), make([True, False]), make([[3], [4]])):
            with pytest.raises(ValueError, match="rng must be an integer or one a text, got"):
                sampler(PROMPTS[:2], 1, rng=bad)
        assert generate(sampler, PROMPTS[:2], 5, rng=3, stop_ids=make([3]), **FREE) == one
        with pytest.raises(ValueError, match="stop_ids must be tokens of the vocabulary"):
            sampler(PROMPTS[:2], 1, stop_ids=make([1.5]))


def array_makers() -> list[Callable[[Any], Any]]:
    makers: list[Callable[[Any], Any]] = [np.array]
    for name, function in (("jax.numpy", "array"), ("torch", "tensor")):
        with contextlib.suppress(ImportError):
            makers.append(getattr(importlib.import_module(name), function))
    return makers


def test_keys_of_jax_are_keys() -> None:
    """Old ones are arrays of two integers, and yet one key for all rows."""
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    import jax

    sampler = make_sampler("jax", sampling=HOT)
    expected = generate(sampler, PROMPTS[:2], rng=jax.random.key(7), **FREE)
    old = jax.random.PRNGKey(7)
    assert generate(sampler, PROMPTS[:2], rng=old, **FREE) == expected
    assert len(generate(sampler, rng=old, **FREE)) == 4
    assert generate(sampler, PROMPTS[:2], rng=[0, 7], **FREE) != expected
    # Several are one a prompt.
    keys = jax.random.split(jax.random.key(7))
    several = generate(sampler, PROMPTS[:2], rng=keys, **FREE)
    assert generate(sampler, PROMPTS[:2], rng=list(keys), **FREE) == several
    assert generate(sampler, PROMPTS[1:2], rng=keys[1:], **FREE) == several[1:]
    olds = list(map(jax.random.key_data, keys))
    assert generate(sampler, PROMPTS[:2], rng=olds, **FREE) == several
    with pytest.raises(ValueError, match="rng must have one seed a text, 4, got 2"):
        sampler(PROMPTS, 1, rng=keys)
    with pytest.raises(ValueError, match="rng must be an integer or one a text, got"):
        sampler(PROMPTS[:2], 1, rng=keys[:, None])
    pytest.importorskip("torch.nn", reason="torch is not installed")
    with pytest.raises(ValueError, match="rng must be an integer or one a text, got"):
        make_sampler("torch", sampling=HOT)(["x"], 1, rng=jax.random.key(7))


def test_both_twins_draw_the_same_text() -> None:
    for submodule in SUBMODULES.values():
        pytest.importorskip(submodule, reason="parity needs both frameworks")
    strategy = Categorical(0.9, top_k=50, top_p=0.95, min_p=0.001, repetition_penalty=1.2)
    one, other = (make_sampler(twin, sampling=strategy) for twin in ("jax", "torch"))
    assert generate(one, rng=5, **FREE) == generate(other, rng=5, **FREE)


def test_the_bundled_model_draws_the_same_text_in_both() -> None:
    """What docs/quickstart.md says of float32."""
    for submodule in SUBMODULES.values():
        pytest.importorskip(submodule, reason="parity needs both frameworks")
    import torch

    import recurrentgemma.jax
    import recurrentgemma.torch

    vocab = recurrentgemma.jax.load_tokenizer()
    model, params = recurrentgemma.jax.load_checkpoint(dtype="float32")
    one = recurrentgemma.jax.Sampler(model, vocab, params)
    other = recurrentgemma.torch.Sampler(
        recurrentgemma.torch.load_checkpoint(dtype=torch.float32), vocab
    )
    options = {"sampling": Categorical(temperature=0.8, top_p=0.95), "num_samples": 2, "rng": 1}
    assert one(["Emma"], 20, **options).text == other(["Emma"], 20, **options).text


def test_several_samples_of_a_prompt(twin: str) -> None:
    sampler = make_sampler(twin, sampling=HOT)
    read = []
    original = sampler.engine.prefill
    sampler.engine.prefill = lambda cache, tokens, pos: (
        read.append(len(tokens)) or original(cache, tokens, pos)
    )
    out = sampler(PROMPTS[:2], STEPS, rng=[3, 4], num_samples=2, echo=True, **FREE)
    assert read == [2] * len(read)  # rows: each prompt is read once
    rows = lists(out.tokens)
    assert len({tuple(row) for row in rows}) == 4
    assert [text.startswith(PROMPTS[0]) for text in out.text] == [True, True, False, False]
    # A sample is the same without the other prompt, and the first without the other samples.
    alone = sampler(PROMPTS[1:2], STEPS, rng=[4], num_samples=2, echo=True, **FREE)
    assert lists(alone.tokens) == rows[2:]
    first = sampler(PROMPTS[1:2], STEPS, rng=[4], echo=True, **FREE)
    assert lists(first.tokens) == rows[2:3]


def test_a_call_may_sample_in_its_own_way(twin: str) -> None:
    sampler = make_sampler(twin)
    hot = make_sampler(twin, sampling=HOT)
    assert generate(sampler, rng=1, sampling=HOT, **FREE) == generate(hot, rng=1, **FREE)
    assert generate(hot, sampling=Greedy(), **FREE) == without_eos(sampler)


def test_repetition_penalty_counts_prompt_and_text(twin: str) -> None:
    sampler = make_sampler(twin)
    for prompt in ("x", "In the beginning"):
        (out,) = generate(sampler, [prompt], 24, sampling=Greedy(1e6), **FREE)
        assert len(set(out)) == 24
        assert not set(out) & set(sampler.tokenizer.encode(prompt))
    state = sampler.prefill("x")
    first = sampler.generate(state, 12, sampling=Greedy(1e6), **FREE)
    second = sampler.generate(first.state, 12, sampling=Greedy(1e6), **FREE)
    whole = generate(sampler, ["x"], 24, sampling=Greedy(1e6), **FREE)[0]
    assert lists(first.tokens)[0] + lists(second.tokens)[0] == whole


# ------------------------------------------------------------------------------------ stops


def test_stop_ids_end_each_row(twin: str) -> None:
    sampler = make_sampler(twin)
    free = without_eos(sampler)
    stop = free[0][3]
    out = sampler(PROMPTS, STEPS, stop_ids=[stop], **FREE)
    for row, tokens, reason in zip(free, lists(out.tokens), out.finish_reasons, strict=True):
        assert tokens == (row[: row.index(stop) + 1] if stop in row else row)
        assert reason == ("stop_id" if stop in row else "length")


def test_stop_strings_end_the_text_before_them(twin: str) -> None:
    sampler = make_sampler(twin)
    (text,) = sampler(["x"], 40, **FREE).text
    for start, length in ((5, 1), (9, 4), (len(text) // 2, 9)):
        stop = text[start : start + length]
        out = sampler(["x", "In the"], 40, stop_strings=["\0never", stop], **FREE)
        assert out.text[0] == text[: text.index(stop)]
        assert out.finish_reasons[0] == "stop_string"
        stream = sampler.stream("x", 40, stop_strings=stop, **FREE)
        assert "".join(piece for _, piece in stream) == out.text[0]
        assert stream.finish_reason == "stop_string"
    # What only began like a stop string is printed after all.
    assert sampler(["x"], 40, stop_strings=text[-3:] + "\0", **FREE).text == [text]


def test_nothing_that_may_become_a_stop_string_is_printed(twin: str) -> None:
    sampler = make_sampler(twin)
    (text,) = sampler(["x"], 40, **FREE).text
    stop = text[10:30]
    printed = ""
    for _, piece in sampler.stream("x", 40, stop_strings=[stop], **FREE):
        printed += piece
        assert not any(printed.endswith(stop[:n]) for n in range(1, len(stop) + 1)) or (
            text[: len(printed) + len(stop)].count(stop) == 0
        )
    assert printed == text[: text.index(stop)]


def test_texts_with_bytes_are_streamed_whole(twin: str) -> None:
    """Every token a byte of a character: text comes only when a character is whole."""
    sampler = make_sampler(twin)
    vocab = sampler.tokenizer.vocab
    data = "héé🐎–x".encode()
    saying(sampler, [vocab.piece_to_id(f"<0x{byte:02X}>") for byte in data])
    pieces = [piece for _, piece in sampler.stream("x", len(data), stop_strings="\0", **FREE)]
    assert pieces == ["h", "", "é", "", "é", "", "", "", "🐎", "", "", "–", "x"]


# ------------------------------------------------------------------------------------ log-probs


def test_log_probabilities_are_those_of_the_logits(twin: str) -> None:
    sampler = make_sampler(twin, sampling=HOT)
    out = sampler(PROMPTS, STEPS, rng=2, num_logprobs=3, return_logits=True, **FREE)
    for tokens, scores, logprobs in zip(out.tokens, out.logits, out.logprobs, strict=True):
        logits = np.asarray(scores, np.float64)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = expected[np.arange(STEPS), np.asarray(tokens)]
        np.testing.assert_allclose(logprobs.chosen, chosen, atol=1e-5)
        order = np.argsort(-expected, -1, kind="stable")[:, :3]
        np.testing.assert_allclose(logprobs.top, np.take_along_axis(expected, order, -1), atol=1e-5)
        assert logprobs.top_tokens.shape == (STEPS, 3)
    stream = sampler.stream(PROMPTS[0], STEPS, rng=2, num_logprobs=3, **FREE)
    for place, _ in enumerate(stream):
        np.testing.assert_allclose(stream.logprobs.chosen, out.logprobs[0].chosen[place], atol=1e-5)
    assert sampler(["x"], 1).logprobs is None
    assert sampler(["x"], 0, num_logprobs=2).logprobs[0].top.shape == (0, 0)
    assert sampler(["x"], 2, num_logprobs=0, **FREE).logprobs[0].top.shape == (2, 0)


def test_scores_are_the_log_probabilities_of_the_text(twin: str) -> None:
    sampler = make_sampler(twin)
    texts = ["In the beginning God", "", "x", "And it came to pass. " * 20]
    scores = sampler.score(texts)
    for text, score in zip(texts, scores, strict=True):
        tokens = sampler.tokenizer.encode(text)
        assert score.tokens == tokens[1:]
        out = sampler([text], 0, echo=True, return_logits=True)
        logits = np.asarray(out.logits[0], np.float64)[:-1]
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = expected[np.arange(len(logits)), tokens[1:]]
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)
        if tokens[1:]:
            np.testing.assert_allclose(score.perplexity, np.exp(-expected.mean()), rtol=1e-5)
    assert np.isnan(scores[1].perplexity)
    # A greedy continuation scores as it was generated.
    out = sampler(["In the"], 8, num_logprobs=0, **FREE)
    tokens = sampler.tokenizer.encode("In the") + lists(out.tokens)[0]
    again = np.concatenate([part for _, part in scored(sampler.engine, tokens)])
    np.testing.assert_allclose(again[-8:], out.logprobs[0].chosen, atol=1e-5)


# ------------------------------------------------------------------------------------ cancelling


def test_a_stream_left_early_goes_on_from_its_state(twin: str) -> None:
    sampler = make_sampler(twin)
    (whole,) = without_eos(sampler, ["In the beginning"], 20)
    stream = sampler.stream("In the beginning", 20, **FREE)
    first = [next(stream)[0] for _ in range(7)]
    early = stream.state
    more = [next(stream)[0] for _ in range(2)]
    stream.close()
    assert list(stream) == []
    assert first + more == whole[:9]
    for state, rest in ((early, whole[7:]), (stream.state, whole[9:])):
        for _ in range(2):  # a state may be continued any number of times
            out = sampler.generate(state, len(rest), **FREE)
            assert lists(out.tokens) == [rest]
    untouched = sampler.stream("In the beginning", 20, **FREE).state
    assert lists(sampler.generate(untouched, 20, **FREE).tokens) == [whole]


@pytest.mark.parametrize("where", ["prefill", "feed", "choose"])
def test_ctrl_c_leaves_everything_usable(twin: str, where: str) -> None:
    """Wherever it strikes, even when a step has already used up the state before it."""
    sampler = make_sampler(twin)
    (whole,) = without_eos(sampler, ["In the beginning"], 12)
    method, calls = getattr(sampler.engine, where), []

    def interrupted(*args):
        result = method(*args)
        calls.append(None)
        if len(calls) == (1 if where == "prefill" else 5):
            raise KeyboardInterrupt
        return result

    setattr(sampler.engine, where, interrupted)
    stream = sampler.stream("In the beginning", 12, **FREE)
    got = []
    with pytest.raises(KeyboardInterrupt):
        got.extend(token for token, _ in stream)
    setattr(sampler.engine, where, method)
    assert got == whole[: 0 if where == "prefill" else 4]
    rest = sampler.generate(stream.state, 12 - len(got), **FREE)
    assert got + lists(rest.tokens)[0] == whole
    assert without_eos(sampler, ["In the beginning"], 12) == [whole]


def test_two_streams_take_turns(twin: str) -> None:
    sampler = make_sampler(twin)
    one, other = (sampler.stream(prompt, 10, **FREE) for prompt in PROMPTS[:2])
    turns = [(next(one)[0], next(other)[0]) for _ in range(10)]
    assert [list(row) for row in zip(*turns, strict=True)] == without_eos(sampler, PROMPTS[:2], 10)


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stop_strings": [""]}, "stop_strings must be strings that are not empty, got ''"),
        ({"stop_strings": ""}, "stop_strings must be strings that are not empty, got ''"),
        ({"stop_strings": ["a", 3]}, "stop_strings must be strings that are not empty, got 3"),
        ({"stop_strings": ["a\udcff"]}, "a stop string must be Unicode text, got an unpaired"),
        ({"stop_ids": [2048]}, "stop_ids must be tokens of the vocabulary of 2048, got 2048"),
        ({"stop_ids": [-1]}, "stop_ids must be tokens of the vocabulary of 2048, got -1"),
        ({"stop_ids": [True]}, "stop_ids must be tokens"),
        ({"stop_ids": np.ones((1, 2), int)}, r"stop_ids must be tokens .* got array\(\[1, 1\]\)"),
        ({"stop_ids": 5}, "stop_ids must be a sequence of token ids, got 5"),
        ({"stop_ids": None}, "stop_ids must be a sequence of token ids, got None"),
        ({"stop_strings": None}, "stop_strings must be a string or several, got None"),
        ({"num_samples": 0}, "num_samples must be an integer of at least 1, got 0"),
        ({"num_logprobs": -1}, "num_logprobs must be an integer from 0 to 2048, got -1"),
        ({"num_logprobs": 2049}, "num_logprobs must be an integer from 0 to 2048, got 2049"),
        ({"stop_ids": b"a"}, "stop_ids must be a sequence of token ids, got b'a'"),
        ({"rng": b"a"}, "rng must be an integer or one a text, got b'a'"),
        ({"rng": "seed"}, "rng must be an integer or one a text, got 'seed'"),
        ({"rng": [1, 2, 3]}, "rng must have one seed a text, 1, got 3"),
        ({"sampling": "greedy"}, "sampling must be Greedy or Categorical, got 'greedy'"),
    ],
)
def test_bad_requests(twin: str, kwargs: dict, message: str) -> None:
    sampler = make_sampler(twin)
    with pytest.raises(ValueError, match=message):
        sampler(["x"], 3, **kwargs)
    if "num_samples" not in kwargs:
        with pytest.raises(ValueError, match=message):
            sampler.stream("x", 3, **kwargs)
    with pytest.raises(ValueError, match=message):
        sampler.generate(sampler.prefill("x"), 3, **kwargs)


def test_no_prompts(twin: str) -> None:
    sampler = make_sampler(twin)
    out = sampler([], 3, return_logits=True, num_logprobs=2)
    assert out == ([], [], [], [], [], None)
    assert sampler([], 3) == ([], [], [], None, [], None)
    assert sampler.score([]) == []
    with pytest.raises(ValueError, match="at least one text is expected, got none"):
        sampler.prefill([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\ud800", r"prompt 1 must be Unicode text, got an unpaired surrogate, '\\ud800', at 1"),
        (b"x", "prompt 1 must be a str or token ids, got bytes: b'x'"),
        (None, "prompt 1 must be a str or token ids, got NoneType: None"),
        (["a"], "prompt 1 must be a str or token ids, got 'a' as token 0"),
    ],
)
def test_what_is_no_text_is_named(twin: str, text: Any, message: str) -> None:
    for tuned in (False, True):
        sampler = make_sampler(twin, is_it_model=tuned)
        for use in (
            lambda: sampler(["x", text], 3),  # noqa: B023
            lambda: sampler.score(["x", text]),  # noqa: B023
            lambda: sampler.prefill(["x", text]),  # noqa: B023
            lambda: sampler.prefill(["x", text], sampler.prefill(["x", "y"])),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=message):
                use()
        with pytest.raises(ValueError, match=message.replace("prompt 1", "prompt 0")):
            sampler.stream(text, 3)


@pytest.mark.parametrize("texts", [5, None, b"x"])
def test_texts_come_in_a_sequence(twin: str, texts: Any) -> None:
    sampler = make_sampler(twin)
    for use in (lambda: sampler(texts, 3), lambda: sampler.score(texts)):
        with pytest.raises(ValueError, match="input_strings must be a sequence of texts"):
            use()


def test_samplers_are_copied_and_pickled(twin: str) -> None:
    """As processes and notebooks do; what is compiled stays behind."""
    sampler = make_sampler(twin)
    expected = without_eos(sampler)
    for again in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert without_eos(again) == expected


def test_parameters_may_be_numpys() -> None:
    """They go to the device once, not at each step."""
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    import jax

    sampler = make_sampler("jax")
    expected = without_eos(sampler, ["x"])
    params = jax.tree.map(np.asarray, sampler.params)
    for given in (params, {"params": params}):
        again = type(sampler)(sampler.model, sampler.tokenizer, given)
        assert without_eos(again, ["x"]) == expected
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(again.params))
        np.testing.assert_array_equal(
            again.score(["x y"])[0].logprobs, sampler.score(["x y"])[0].logprobs
        )
    sampler.params = params
    assert without_eos(sampler, ["x"]) == expected
