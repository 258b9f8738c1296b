"""Logits that are NaN or infinite: one named error, with the part where it begins."""

import dataclasses
import re

import numpy as np
import pytest
from samplers import CONFIG, make_sampler

from recurrentgemma.common.errors import NonFiniteLogitsError
from recurrentgemma.common.generation.strategies import Categorical, Greedy

CALLS = {
    "greedy": lambda s: s(["In the beginning"], 4, sampling=Greedy()),
    "top-p": lambda s: s(["In the beginning"], 4, sampling=Categorical(top_p=0.9), rng=1),
    "top-k": lambda s: s(["In the beginning"], 4, sampling=Categorical(top_k=5), rng=1),
    "plain": lambda s: s(["In the beginning"], 4, sampling=Categorical(), rng=1),
    "penalty": lambda s: s(["In the beginning"], 4, sampling=Greedy(1.5)),
    "log-probabilities": lambda s: s(["In the beginning"], 4, num_logprobs=2),
    "stream": lambda s: list(s.stream("In the beginning", 4)),
    "state": lambda s: s.generate(s.prefill("In the beginning"), 4),
    "score": lambda s: s.score(["In the beginning"]),
    "bursts": lambda s: setattr(s.engine, "burst", 4) or s(["In the beginning"], 9),
}


def spoiled(twin: str, path: str, value: float = np.nan, **settings):
    """A sampler with one spoiled weight."""
    sampler = make_sampler(twin, **settings)
    if twin == "torch":
        sampler.model.get_parameter(path).data.view(-1)[0] = value
        return sampler
    import jax

    def spoil(keys, leaf):
        here = ".".join(str(key.key) for key in keys).removeprefix("params.")
        return leaf.reshape(-1).at[0].set(value).reshape(leaf.shape) if here == path else leaf

    sampler.params = jax.tree_util.tree_map_with_path(spoil, sampler.params)
    return sampler


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_error_says_where_it_begins(twin: str, call) -> None:
    sampler = spoiled(twin, "blocks.1.channel_pre_norm.scale")
    with pytest.raises(
        NonFiniteLogitsError, match=r"begins in blocks\.1\.channel_pre_norm, by token "
    ):
        call(sampler)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("final_norm.scale", "final_norm"),
        ("blocks.0.temporal_pre_norm.scale", "blocks.0.temporal_pre_norm"),
    ],
)
def test_parts_are_named(twin: str, path: str, part: str) -> None:
    with pytest.raises(NonFiniteLogitsError, match=re.escape(f"begins in {part}, by")):
        spoiled(twin, path)(["In the beginning"], 2)  # the shapes of the calls above


def test_float16_that_overflows_names_the_dtype(twin: str) -> None:
    """As a real model does: finite weights and finite values in float32."""
    config = dataclasses.replace(CONFIG, block_types=("attention",))
    path = "blocks.0.channel_pre_norm.scale"
    wide = spoiled(twin, path, 60_000.0, config=config)
    assert len(wide(["In the beginning"], 3, end_sampling_at_eos_token=False).tokens[0]) == 3
    narrow = spoiled(twin, path, 60_000.0, config=config, dtype="float16")
    with pytest.raises(NonFiniteLogitsError, match="float16 ends at 65504: load the model in bf"):
        narrow(["In the beginning"], 3)


def test_rows_that_are_finite_are_not_blamed(twin: str) -> None:
    """The row is named, and one that ended before does not count."""
    sampler = make_sampler(twin)
    choose, calls = sampler.engine.choose, []

    def choosing(*args):
        sampled, seen = choose(*args)
        calls.append(1)
        tokens = np.array(sampler.engine.on_host(sampled.tokens))
        tokens[1] = -1 if len(calls) == 3 else tokens[1]
        return sampled._replace(tokens=sampler.engine.on_device(tokens)), seen

    sampler.engine.choose = choosing
    options = {"end_sampling_at_eos_token": False}
    out = sampler(["a", "b"], [4, 2], **options)
    assert [len(row) for row in out.tokens] == [4, 2]
    calls.clear()
    with pytest.raises(NonFiniteLogitsError, match=r"for row 1: .* begins in the logits, by token"):
        sampler(["a", "b"], [4, 4], **options)


def test_float16_is_close_to_float32(twin: str) -> None:
    one, other = (make_sampler(twin, dtype=dtype) for dtype in ("float32", "float16"))
    wide, narrow = (s.score(["In the beginning"])[0].logprobs for s in (one, other))
    np.testing.assert_allclose(narrow, wide, atol=2e-2)
