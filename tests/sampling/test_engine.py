"""The engine under the samplers: what is compiled, what a finished row costs, what stays flat."""

import gc
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from samplers import CONFIG, PROMPTS, lists, make_sampler, without_eos
from sweeps import sweep

from recurrentgemma.common.generation.engine import Engine
from recurrentgemma.common.model.state import empty_state

FREE = {"end_sampling_at_eos_token": False}


def test_nothing_compiles_after_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any of 50 prompt lengths up to 4096, any number of steps, and another sampler."""
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    import jax

    monkeypatch.setattr(Engine, "prepares", True)  # as it is outside of tests
    compiled = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    def complete(sampler, length: int, steps: int) -> None:
        tokens = rng.integers(5, CONFIG.vocab_size, size=length).tolist()
        state = empty_state(CONFIG, 1).extended([tokens])
        assert len(list(sampler.generation(state, steps, **FREE))) == steps

    rng = np.random.default_rng(0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        complete(make_sampler("jax"), 3, 2)
        again = make_sampler("jax")  # its own parameters compile
        compiled.clear()
        for length in (*rng.integers(1, 4097, size=48), 1, 4096):
            complete(again, int(length), int(rng.integers(1, 5)))
        assert compiled == []
        # Nor for any length of a text that is scored, or that is returned with its logits.
        again.score(["x" * 400])
        compiled.clear()
        for length in range(1, 70, 3):
            again.score(["x" * length])
            again(["x" * length], 0, echo=True, return_logits=True)
        assert compiled == []
        # Sanity: something that was never compiled is noticed.
        jax.jit(lambda x: x + 3)(np.ones(17)).block_until_ready()
        assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_logits_are_computed_only_where_they_are_needed(twin: str) -> None:
    sampler = make_sampler(twin)
    shapes = []
    feed = sampler.engine.feed

    def noting(*args):
        logits, run = feed(*args)
        shapes.append(tuple(logits.shape))
        return logits, run

    sampler.engine.feed = noting
    sampler(["And it came to pass " * 20, "x"], 3, **FREE)
    assert shapes == [(2, CONFIG.vocab_size)] * 3


def test_a_finished_row_changes_nothing(twin: str) -> None:
    sampler = make_sampler(twin)
    free = without_eos(sampler, PROMPTS, 20)
    stop = free[0][3]
    end = free[0].index(stop) + 1
    fed = []
    feed = sampler.engine.feed

    def noting(run, tokens, segment_pos):
        fed.append((tokens.tolist(), segment_pos.tolist()))
        return feed(run, tokens, segment_pos)

    sampler.engine.feed = noting
    out = sampler.generate(sampler.prefill(PROMPTS), 20, stop_ids=[stop], **FREE)
    assert lists(out.tokens)[0] == free[0][:end]
    for step, (tokens, segment_pos) in enumerate(fed):
        ended = step >= end
        assert (segment_pos[0] == -1) == ended
        if ended:
            assert tokens[0] == sampler.tokenizer.pad_id
    assert any(len(row) == 20 for row in lists(out.tokens))
    alone = sampler.generate(sampler.prefill(PROMPTS[0]), 20, stop_ids=[stop], **FREE)
    assert out.state.num_tokens[0] == alone.state.num_tokens[0]
    assert out.state.pending[0] == alone.state.pending[0] == (stop,)
    batch, single = (sampler.engine.to_numpy(state.cache) for state in (out.state, alone.state))
    for block, fields in single.items():
        for field, value in fields.items():
            np.testing.assert_allclose(batch[block][field][:1], value, atol=1e-5)


def test_everything_stops_when_all_rows_have(twin: str) -> None:
    sampler = make_sampler(twin)
    free = without_eos(sampler, ["x"], 20)[0]
    state = empty_state(CONFIG, 1).extended([sampler.tokenizer.encode("x")])
    steps = list(sampler.generation(state, 20, stop_ids=[free[2]], **FREE))
    assert len(steps) == free.index(free[2]) + 1


@pytest.mark.usefixtures("unchecked_types")
def test_a_long_stream_stays_flat(twin: str) -> None:
    """benchmarks/long_stream.py does this for a million tokens."""
    sampler = make_sampler(twin)
    first, last = sweep((600, 900), (800, 1400))
    stream = sampler.stream("x", last + 1, **FREE)
    sizes, memory = {}, {}
    tracemalloc.start()
    try:
        for step, _ in enumerate(stream):
            if step in (first, last):
                sizes[step] = stream.state.nbytes
                gc.collect()  # what only waits for it is not held
                memory[step] = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert sizes[first] == sizes[last]
    # 4 bytes a token, and what Python keeps at hand
    assert memory[last] - memory[first] < 40 * (last - first)


def test_compiled_or_not() -> None:
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    sampler = make_sampler("jax", jit_compile=False)
    assert without_eos(sampler, ["x"], 3) == without_eos(make_sampler("jax"), ["x"], 3)


def test_an_xla_that_lacks_the_options(monkeypatch) -> None:
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    from recurrentgemma.jax.runtime import compiler

    known = compiler._OPTIONS["cpu"]
    assert compiler.compiler_options("cpu") == known
    assert compiler.compiler_options("cpu", in_place=True) == known | compiler._IN_PLACE["cpu"]
    monkeypatch.setitem(compiler._IN_PLACE, "cpu", {"xla_no_such_option": 1})
    assert compiler.compiler_options("cpu", in_place=True) == known
    monkeypatch.setitem(compiler._OPTIONS, "cpu", {"xla_no_such_option": 1})
    assert compiler.compiler_options("cpu") is None


def test_the_compilation_cache_on_disk_is_used() -> None:
    """What is compiled at the first call is there for the next process; tests set the folder."""
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    make_sampler("jax")(["x"], 2)
    names = {path.name.split("-")[0] for path in Path(folder).iterdir()}
    assert {"jit_prefill", "jit_feed", "jit__choose"} <= names


def test_another_model_takes_the_place(twin: str) -> None:
    """In all steps, those of decoding too."""
    one, other = (make_sampler(twin, seed=seed) for seed in (0, 1))
    expected = without_eos(other)
    assert without_eos(one) != expected
    for name in ("model", "params") if twin == "jax" else ("model",):
        setattr(one, name, getattr(other, name))
    assert without_eos(one) == expected
