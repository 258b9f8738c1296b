"""The sampling methods by themselves: which tokens they keep, and how often each is drawn."""

import copy
import itertools

import numpy as np
import pytest
from samplers import generate, make_sampler, sampling_function
from sweeps import sweep

from recurrentgemma.common.generation.requests import RowRequest
from recurrentgemma.common.generation.settings import RowSettings, row_settings, variant_of
from recurrentgemma.common.generation.stops import Stops
from recurrentgemma.common.generation.strategies import Categorical, Greedy, row_keys, uniform

SIZE, COUNT, GROUPS = 4096, sweep(2048, 4096), 64
TINY, HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
CRITICAL = 103.4  # of chi-square with 63 degrees of freedom, p = 0.001


def array(twin: str, values, dtype: str = "float32"):
    if twin == "jax":
        import jax.numpy as jnp

        return jnp.asarray(values, dtype)
    import torch

    return torch.tensor(np.asarray(values)).to(getattr(torch, dtype))


def settings(twin: str, sampling, num_rows: int):
    """The variant and settings of rows that all choose in one way."""
    rows = [RowRequest(1, sampling, Stops({}, ()))] * num_rows
    arrays = row_settings(rows, SIZE)
    dtypes = {"top_k": "int32", "stop_ids": "int32", "biased_ids": "int32"}
    fields = {name: array(twin, value, dtypes.get(name, "float32"))
              for name, value in arrays._asdict().items()}  # fmt: skip
    return variant_of(rows, SIZE, None, False), RowSettings(**fields)


def draw(twin: str, sampling, logits, numbers, seen=None) -> np.ndarray:
    variant, arrays = settings(twin, sampling, len(logits))
    variant = variant._replace(width=min(variant.width, logits.shape[1]))
    return np.asarray(sampling_function(twin, "draw", 0)(variant, arrays, logits, numbers, seen))


def draw_many(twin: str, sampling, logits: np.ndarray, count: int, dtype: str = "float32"):
    """`count` independent draws from one row of logits, the same every run."""
    numbers = uniform(row_keys(0, count), np.arange(count))[0]
    drawn = []
    for part in np.split(numbers, max(1, count // 1024)):
        rows = array(twin, np.tile(logits, (len(part), 1)), dtype)
        drawn.append(draw(twin, sampling, rows, array(twin, part)))
    return np.concatenate(drawn)


def rounded(logits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float32":
        return logits.astype(np.float32).astype(np.float64)
    import ml_dtypes

    return logits.astype(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize(
    ("shape", "temperature", "dtype"),
    sweep(
        [("uniform", 1.0, "float32"), ("shuffled", 0.5, "bfloat16")],
        list(itertools.product(["uniform", "shuffled"], [1.0, 0.5], ["float32", "bfloat16"])),
    ),
)
def test_draws_follow_the_softmax(twin: str, dtype: str, temperature: float, shape: str) -> None:
    """Chi-square over 4096 tokens in groups of 64."""
    logits = np.zeros(SIZE) if shape == "uniform" else np.linspace(0, 3, SIZE)
    if shape == "shuffled":
        logits = np.random.default_rng(0).permutation(logits)
    drawn = draw_many(twin, Categorical(temperature), logits, COUNT, dtype)
    weights = np.exp(rounded(logits, dtype) / temperature)
    expected = COUNT * (weights / weights.sum()).reshape(GROUPS, -1).sum(1)
    observed = np.bincount(drawn // (SIZE // GROUPS), minlength=GROUPS)
    assert ((observed - expected) ** 2 / expected).sum() < CRITICAL


@pytest.mark.parametrize("sampling", [Categorical(top_p=0.999999), Categorical(top_k=SIZE)])
def test_sorted_draws_follow_the_softmax_too(twin: str, sampling: Categorical) -> None:
    size = sweep(1024, SIZE)  # sorting takes long
    logits = np.random.default_rng(0).permutation(np.linspace(0, 3, size))
    count = 1024
    drawn = draw_many(twin, sampling, logits, count)
    weights = np.exp(logits)
    expected = count * (weights / weights.sum()).reshape(GROUPS, -1).sum(1)
    observed = np.bincount(drawn // (size // GROUPS), minlength=GROUPS)
    assert ((observed - expected) ** 2 / expected).sum() < CRITICAL


def test_both_twins_draw_the_same() -> None:
    pytest.importorskip("jax.numpy", reason="parity needs both frameworks")
    pytest.importorskip("torch.nn", reason="parity needs both frameworks")
    logits = np.random.default_rng(0).normal(size=300)
    for sampling in (Categorical(), Categorical(0.7, top_k=40, top_p=0.9, min_p=0.01)):
        one, other = (draw_many(twin, sampling, logits, 1024) for twin in ("jax", "torch"))
        np.testing.assert_array_equal(one, other)


def kept(twin: str, sampling: Categorical, probabilities) -> list[int]:
    with np.errstate(divide="ignore"):
        logits = np.log(np.asarray([probabilities], np.float32))
    variant, arrays = settings(twin, sampling, 1)
    values, ids = array(twin, logits), None
    if variant.width:
        width = min(variant.width, logits.shape[1])
        values, ids = sampling_function(twin, "top", 1)(values, width)
    values = sampling_function(twin, "cut_off", 2)(arrays, values, ids is not None)
    finite = np.isfinite(np.asarray(values[0]))
    ids = np.arange(len(finite)) if ids is None else np.asarray(ids[0])
    return sorted(ids[finite].tolist())


def test_cut_offs_keep_the_right_tokens(twin: str) -> None:
    p = [0.1, 0.3, 0.2, 0.3, 0.1]
    assert kept(twin, Categorical(), p) == [0, 1, 2, 3, 4]
    assert kept(twin, Categorical(top_p=1.0, min_p=0.0), p) == [0, 1, 2, 3, 4]
    assert kept(twin, Categorical(top_k=1), p) == [1]  # of equals the lowest id
    assert kept(twin, Categorical(top_k=3), p) == [1, 2, 3]
    assert kept(twin, Categorical(top_k=4), p) == [0, 1, 2, 3]
    assert kept(twin, Categorical(top_k=99), p) == [0, 1, 2, 3, 4]
    assert kept(twin, Categorical(top_p=0.25), p) == [1]
    assert kept(twin, Categorical(top_p=0.55), p) == [1, 3]
    assert kept(twin, Categorical(top_p=0.75), p) == [1, 2, 3]
    assert kept(twin, Categorical(top_p=0.85), p) == [0, 1, 2, 3]
    assert kept(twin, Categorical(top_p=1e-9), p) == [1]
    assert kept(twin, Categorical(min_p=0.5), p) == [1, 2, 3]
    assert kept(twin, Categorical(min_p=1.0), p) == [1, 3]
    # top_p counts within what top_k keeps: 0.5, 0.5.
    assert kept(twin, Categorical(top_k=2, top_p=0.4), p) == [1]
    assert kept(twin, Categorical(top_k=3, min_p=0.9), p) == [1, 3]


@pytest.mark.parametrize("k", [1, 2, 7, 64, 100])
def test_top_k_among_equals(twin: str, k: int) -> None:
    """Few distinct values, so that nearly every cut goes through equals."""
    values = np.random.default_rng(k).integers(1, 4, size=100)
    expected = sorted(sorted(range(100), key=lambda i: (-values[i], i))[:k])
    assert kept(twin, Categorical(top_k=k), values / values.sum()) == expected


def test_top_p_of_one_keeps_the_least_likely(twin: str) -> None:
    logits = np.zeros(SIZE)
    logits[1:] = -15.0
    p = np.exp(logits) / np.exp(logits).sum()
    assert kept(twin, Categorical(top_p=1.0), p) == list(range(SIZE))
    assert kept(twin, Categorical(top_p=1.0, top_k=SIZE), p) == list(range(SIZE))


def test_draws_respect_cut_offs(twin: str) -> None:
    logits = np.log(np.asarray([0.1, 0.3, 0.2, 0.3, 0.1]))
    drawn = draw_many(twin, Categorical(top_k=3), logits, 1024)
    assert set(drawn.tolist()) == {1, 2, 3}
    drawn = draw_many(twin, Categorical(min_p=0.9), logits, 1024)
    assert set(drawn.tolist()) == {1, 3}


def test_extreme_numbers_choose_possible_tokens(twin: str) -> None:
    """At the ends of (0, 1] and with impossible tokens at both ends of the vocabulary."""
    logits = np.random.default_rng(0).normal(size=(2, SIZE)).astype(np.float32)
    logits[:, :9] = logits[:, -9:] = -np.inf
    numbers = array(twin, [2.0**-24, 1.0])
    for sampling in (Categorical(), Categorical(top_p=0.999), Categorical(1e-30)):
        for token in draw(twin, sampling, array(twin, logits), numbers):
            assert 9 <= token < SIZE - 9


@pytest.mark.parametrize("value", [np.float16(0.5), np.float32(HUGE), np.int32(2), 2, TINY])
def test_any_kind_of_number_will_do(value) -> None:
    assert Categorical(value).temperature == Greedy(value).repetition_penalty == value


@pytest.mark.parametrize("others", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_temperatures_at_the_ends_of_their_range(twin: str, others: dict) -> None:
    """The least takes the likeliest token, the most makes all that are kept equally likely."""
    logits = np.random.default_rng(0).permutation(np.linspace(-30, 30, SIZE))
    count = sweep(128, 1024)
    drawn = draw_many(twin, Categorical(TINY, **others), logits, count)
    assert set(drawn.tolist()) == {int(logits.argmax())}
    drawn = draw_many(twin, Categorical(HUGE, **others), logits, count)
    likely = np.argsort(-logits)[:40] if "top_k" in others else np.arange(SIZE)
    assert set(drawn.tolist()) <= set(likely.tolist())
    assert len(set(drawn.tolist())) > 30


@pytest.mark.parametrize("temperature", [TINY, 1.0, HUGE])
@pytest.mark.parametrize("penalty", [TINY, HUGE])
def test_penalties_at_the_ends_of_their_range(
    twin: str, penalty: float, temperature: float
) -> None:
    """Whatever the logits' signs, and even where every token was seen."""
    for offset in (-20, 0, 20):
        check_penalty(twin, penalty, temperature, offset)


def check_penalty(twin: str, penalty: float, temperature: float, offset: float) -> None:
    logits = np.random.default_rng(0).uniform(-10, 10, size=(3, 64)).astype(np.float32) + offset
    seen = np.zeros((3, 64), bool)
    seen[1, 5:9] = seen[2] = True
    arrays = array(twin, logits), array(twin, [0.5] * 3), array(twin, seen, "int32")
    greedy = draw(twin, Greedy(penalty), *arrays)
    assert greedy[0] == logits[0].argmax()
    drawn = draw(twin, Categorical(temperature, None, 1.0, 0.0, penalty), *arrays)
    wide = logits.astype(np.float64)
    penalised = np.where(wide > 0, wide / penalty, wide * penalty)
    wide = np.where(seen, penalised.clip(-HUGE, HUGE), wide)
    below = wide.max(-1, keepdims=True) - wide
    near = 100 * TINY  # numbers so small may count as 0
    assert (below[np.arange(3), greedy] <= near).all()
    assert (below[np.arange(3), drawn] <= near + 104 * temperature).all()


def test_repetition_penalty(twin: str) -> None:
    logits = array(twin, [[2.0, 1.5, -1.0], [-1.0, -1.5, -3.0]])
    seen = array(twin, [[1, 0, 0], [1, 0, 0]], "int32")
    numbers = array(twin, [1.0, 1.0])

    def penalised(penalty: float) -> list[int]:
        return draw(twin, Greedy(penalty), logits, numbers, seen).tolist()

    assert penalised(1.0) == [0, 0]
    assert penalised(1.3) == [0, 0]
    assert penalised(1.4) == [1, 0]  # 2 / 1.4 < 1.5
    assert penalised(1.6) == [1, 1]  # -1 * 1.6 < -1.5


def test_presence_frequency_and_bias(twin: str) -> None:
    """Generated tokens count, those of the prompt do not; the numbers are exact in float32."""
    logits = array(twin, [[4.0, 3.0, 2.0, 1.0]])
    # Token 0 was generated twice, 1 is the prompt's and was generated once, 2 is the prompt's.
    seen, numbers = array(twin, [[4, 3, 1, 0]], "int32"), array(twin, [1.0])

    def chosen(**fields) -> int:
        (greedy,) = draw(twin, Greedy(**fields), logits, numbers, seen).tolist()
        cold = Categorical(TINY, **fields)
        assert draw(twin, cold, logits, numbers, seen).tolist() == [greedy]
        return greedy

    assert chosen() == 0
    assert chosen(presence_penalty=1.5) == 0  # [2.5, 1.5, 2, 1]
    assert chosen(presence_penalty=2.5) == 2  # [1.5, 0.5, 2, 1]
    assert chosen(frequency_penalty=0.75) == 0  # [2.5, 2.25, 2, 1]
    assert chosen(frequency_penalty=1.25) == 2  # [1.5, 1.75, 2, 1]
    assert chosen(frequency_penalty=-1.0) == 0
    assert chosen(logit_bias={3: 3.5}) == 3
    assert chosen(logit_bias=((0, -100.0), (1, -0.5))) == 1
    assert chosen(repetition_penalty=2.0, presence_penalty=0.25) == 0  # [1.75, 1.25, 1, 1]
    assert chosen(repetition_penalty=4.0, presence_penalty=0.25) == 3  # [0.75, 0.5, 0.5, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"presence_penalty": float("nan")}, "presence_penalty must be finite"),
        ({"frequency_penalty": "x"}, "frequency_penalty must be finite"),
        ({"logit_bias": {5: float("inf")}}, "logit_bias must be finite"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias must have token ids"),
    ],
)
def test_penalties_are_checked(fields, message: str) -> None:
    for strategy in (Greedy, Categorical):
        with pytest.raises(ValueError, match=message):
            strategy(**fields)


def test_a_sampler_counts_what_it_generates(twin: str) -> None:
    """With a large frequency penalty no token comes twice, also in bursts; a bias forbids one."""
    sampler = make_sampler(twin)
    (free,) = generate(sampler, ["x"], 12, end_sampling_at_eos_token=False)
    assert len(set(free)) < 12
    strategy = Greedy(frequency_penalty=1e4)
    for burst in (1, 4):
        sampler.engine.burst = burst
        (once,) = generate(sampler, ["x"], 12, sampling=strategy, end_sampling_at_eos_token=False)
        assert len(set(once)) == 12
        assert once[0] == free[0]
    (other,) = generate(
        sampler,
        ["x"],
        1,
        sampling=Greedy(logit_bias={free[0]: -1e4}),
        end_sampling_at_eos_token=False,
    )
    assert other != free[:1]
    with pytest.raises(ValueError, match="logit_bias must have tokens of the vocabulary of 2048"):
        sampler(["x"], 1, sampling=Greedy(logit_bias={2048: 1.0}))


def test_log_probabilities(twin: str) -> None:
    """They are the model's, whatever the strategy."""
    choose = sampling_function(twin, "choose", 0)
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    logits[1, 7] = logits[1, 9] = 9.0  # equals in order of id
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    strategy = Categorical(temperature=0.3, top_k=5)
    numbers = array(twin, [0.1, 0.5, 0.9])
    variant, arrays = settings(twin, strategy, 3)
    variant = variant._replace(width=50, num_logprobs=4)
    tokens, logprobs, _ = choose(variant, arrays, array(twin, logits), numbers)
    tokens = np.asarray(tokens)
    np.testing.assert_allclose(logprobs.chosen, expected[np.arange(3), tokens], rtol=1e-5)
    order = np.argsort(-expected, axis=-1, kind="stable")[:, :4]
    np.testing.assert_array_equal(logprobs.top_tokens, order)
    np.testing.assert_allclose(logprobs.top, np.take_along_axis(expected, order, -1), rtol=1e-5)
    variant = variant._replace(num_logprobs=None)
    assert choose(variant, arrays, array(twin, logits), numbers)[1:] == (None, None)


def test_random_streams() -> None:
    alone = uniform(row_keys([7], 1), [3])
    batch = uniform(row_keys([5, 7, 9], 3), [1, 3, 2])
    assert batch[0, 1] == alone[0, 0]
    # Several steps at once are those one after the other; a row without a key gets ones.
    ahead = uniform([*row_keys([5, 7], 2), None], [1, 3, 9], 5)
    steps = [uniform(row_keys([5, 7], 2), [1 + step, 3 + step])[0] for step in range(5)]
    np.testing.assert_array_equal(ahead, np.column_stack([steps, np.ones(5, np.float32)]))
    # The row and the position count, and so does each sample.
    keys = row_keys(0, 2, 2)
    numbers = [uniform(keys, [step] * 4) for step in range(50)]
    assert len(np.unique(numbers)) == 200
    assert (np.array(numbers) > 0).all()
    assert (np.array(numbers) <= 1).all()
    many = uniform(row_keys(1, 1) * 8192, np.arange(8192))
    observed = np.histogram(many, bins=GROUPS, range=(0, 1))[0]
    assert ((observed - 128) ** 2 / 128).sum() < CRITICAL


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": -1}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"temperature": float("inf")}, "temperature must be above 0 and finite"),
        ({"temperature": "hot"}, "temperature must be above 0 and finite, got hot"),
        ({"top_k": 0}, "top_k must be a positive integer, got 0"),
        ({"top_k": 1.5}, "top_k must be a positive integer"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"min_p": 1.1}, r"min_p must be in \[0, 1\], got 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 and finite, got 0"),
        ({"temperature": 1e-300}, r"got 1e-300 \(in float32: from 1.18e-38 to 3.4e\+38"),
        ({"temperature": np.nextafter(TINY, 0)}, "got 1.1754943508222874e-38"),
        ({"temperature": np.float16("inf")}, "temperature must be above 0 and finite, got inf"),
        ({"temperature": 10**400}, "temperature must be above 0 and finite, got 1000"),
        ({"repetition_penalty": 1e-40}, r"got 1e-40 \(in float32: from 1.18e-38 to 3.4e\+38\)"),
        ({"repetition_penalty": 1e39}, r"got 1e\+39 \(in float32: from 1.18e-38 to 3.4e\+38\)"),
    ],
)
def test_bad_strategies(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Categorical(**kwargs)


@pytest.mark.parametrize("seeds", [[3, 4], (np.int8(3), 4), np.array([3, 4], np.uint64)])
def test_seeds_come_in_any_sequence(seeds) -> None:
    np.testing.assert_array_equal(row_keys(seeds, 2), row_keys([3, 4], 2))
    np.testing.assert_array_equal(row_keys(np.array(3), 2), row_keys(3, 2))


def test_bad_seeds() -> None:
    with pytest.raises(ValueError, match="rng must be an integer or one a text, got 'x'"):
        row_keys("x", 1)
    for bad in (1.5, True, [1, "2"], np.ones(2), np.ones(2, bool), np.ones((2, 1), int)):
        with pytest.raises(ValueError, match="rng must be an integer or one a text, got"):
            row_keys(bad, 2)
    with pytest.raises(ValueError, match="rng must have one seed a text, 2, got 3"):
        row_keys([1, 2, 3], 2)
    with pytest.raises(ValueError, match="repetition_penalty must be above 0"):
        Greedy(float("nan"))


def test_a_copied_stream_knows_how_often_it_had_each_token(twin: str) -> None:
    """It goes on as the stream does, though a penalty counts what came before the copy."""
    sampler = make_sampler(twin)
    for strategy in (Greedy(frequency_penalty=1e4), Greedy(presence_penalty=0.5)):
        stream = sampler.stream("In the", 12, sampling=strategy)
        before = [next(stream)[0] for _ in range(6)]
        copied = copy.copy(stream)
        after = [token for token, _ in stream]
        assert [token for token, _ in copied] == after
        if strategy.frequency_penalty:
            assert len({*before, *after}) == len(before) + len(after)
