"""States: a prompt paid once, forks and rewinds, files that either framework goes on from."""

import dataclasses
import itertools
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from samplers import CONFIG, PROMPTS, STEPS, SUBMODULES, lists, make_sampler, without_eos
from sweeps import sweep

from recurrentgemma.common.errors import DestinationError
from recurrentgemma.common.generation.prefill import scored
from recurrentgemma.common.generation.strategies import Categorical
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.memory import state_bytes
from recurrentgemma.common.model.state import StateError, empty_state

OTHER = {"jax": "torch", "torch": "jax"}
FREE = {"end_sampling_at_eos_token": False}


def test_a_state_is_continued_as_its_prompt_is(twin: str) -> None:
    sampler = make_sampler(twin)
    whole = without_eos(sampler, PROMPTS, 20)
    state = sampler.prefill(PROMPTS)
    assert lists(sampler.generate(state, 20, **FREE).tokens) == whole
    first = sampler.generate(state, 8, **FREE)
    second = sampler.generate(first.state, 12, **FREE)
    pairs = zip(lists(first.tokens), lists(second.tokens), strict=True)
    assert [one + other for one, other in pairs] == whole
    assert second.state.num_tokens == tuple(
        len(sampler.tokenizer.encode(prompt)) + 20 for prompt in PROMPTS
    )
    assert lists(sampler.generate(state, 0, **FREE).tokens) == [[]] * 4


def test_draws_go_on_where_they_were(twin: str) -> None:
    """The number that a token is drawn with is of its seed and position alone."""
    sampler = make_sampler(twin, sampling=Categorical(1.5))
    (whole,) = lists(sampler(["x"], 20, rng=4, **FREE).tokens)
    first = sampler.generate(sampler.prefill("x"), 7, rng=4, **FREE)
    second = sampler.generate(first.state, 13, rng=4, **FREE)
    assert lists(first.tokens)[0] + lists(second.tokens)[0] == whole


def test_text_is_added_to_a_state(twin: str) -> None:
    sampler = make_sampler(twin)
    prompt, questions = "In the beginning God created the heavens.", ["", "\nAnd?", "\nWho? " * 30]
    shared = sampler.prefill(prompt)
    read = []
    prefill = sampler.engine.prefill
    sampler.engine.prefill = lambda cache, tokens, pos: (
        read.append(int((pos >= 0).sum())) or prefill(cache, tokens, pos)
    )
    several = sampler.prefill(questions, shared)
    tokens = [sampler.tokenizer.vocab.encode(question) for question in questions]
    assert sum(read) == sum(map(len, tokens))  # and the shared prompt no more
    sampler.engine.prefill = prefill
    whole = [sampler.tokenizer.encode(prompt) + row for row in tokens]
    assert several.num_tokens == tuple(map(len, whole))
    outs = lists(sampler.generate(several, STEPS, **FREE).tokens)
    for question, row, out in zip(questions, whole, outs, strict=True):
        alone = sampler.prefill(question, shared)
        assert lists(sampler.generate(alone, STEPS, **FREE).tokens) == [out]
        chunks = scored(sampler.engine, [*row, *out], True)
        scores = np.concatenate([logits for logits, _ in chunks])
        np.testing.assert_array_equal(scores[len(row) - 1 :].argmax(-1), out)


def test_the_size_of_a_state_is_constant(twin: str) -> None:
    sampler = make_sampler(twin)
    short, long = sampler.prefill("x"), sampler.prefill("And it came to pass " * 40)
    assert short.nbytes == long.nbytes > 0
    assert [len(row) for row in long.pending] == [1]


def test_the_documented_size_of_a_2b_state() -> None:
    """17.2 MB in bfloat16 (the RG-LRU's part in float32)."""
    config = GriffinConfig.from_preset("RECURRENT_GEMMA_2B_V1")
    assert round(state_bytes(config, "bfloat16") / 1e6, 1) == 17.2


@pytest.mark.parametrize(
    ("twin", "dtype"),
    sweep(
        [("jax", "float32"), ("torch", "float32"), ("jax", "bfloat16"), ("torch", "float16")],
        list(itertools.product(OTHER, ["float32", "bfloat16", "float16"])),
    ),
)
def test_a_file_goes_on_in_the_other_framework(twin: str, dtype: str, tmp_path) -> None:
    for submodule in SUBMODULES.values():
        pytest.importorskip(submodule, reason="parity needs both frameworks")
    one, other = make_sampler(twin, dtype=dtype), make_sampler(OTHER[twin], dtype=dtype)
    state = one.generate(one.prefill(PROMPTS), 4, **FREE).state
    one.save_state(tmp_path / "state", state, notes={"about": "é"})
    for sampler in (one, other):
        loaded, notes = sampler.load_state_and_notes(tmp_path / "state")
        assert notes == {"about": "é"}
        assert (loaded.lengths, loaded.pending) == (state.lengths, state.pending)
        np.testing.assert_array_equal(loaded.seen, state.seen)
        assert loaded.nbytes == state.nbytes
        back, expected = sampler.engine.to_numpy(loaded.cache), one.engine.to_numpy(state.cache)
        for block, fields in expected.items():
            for field, value in fields.items():
                np.testing.assert_array_equal(back[block][field], value)
    expected = lists(one.generate(state, 30, **FREE).tokens)
    assert lists(one.generate(loaded_by(one, tmp_path), 30, **FREE).tokens) == expected
    if dtype == "float32":  # others round differently in the two
        assert lists(other.generate(loaded_by(other, tmp_path), 30, **FREE).tokens) == expected
    assert (tmp_path / "state").stat().st_size < state.nbytes + 4 * CONFIG.vocab_size // 8 + 8000


def loaded_by(sampler, folder):
    return sampler.load_state(folder / "state")


def test_a_state_before_the_first_token_is_saved_too(twin: str, tmp_path) -> None:
    sampler = make_sampler(twin)
    untouched = sampler.stream("In the beginning", 3).state
    sampler.save_state(tmp_path / "state", untouched)
    out = sampler.generate(sampler.load_state(tmp_path / "state"), STEPS, **FREE)
    assert lists(out.tokens) == without_eos(sampler, ["In the beginning"])


def test_files_in_the_home_folder(twin: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sampler = make_sampler(twin)
    state = sampler.prefill("x")
    for path in ("~/state", "~nobody-of-this-name"):
        sampler.save_state(path, state)
        assert sampler.load_state(path).pending == state.pending
    assert sorted(os.listdir(tmp_path)) == ["state", "~nobody-of-this-name"]


# ------------------------------------------------------------------------------------ bad files


def test_files_are_written_whole_and_not_over_others(twin: str, tmp_path, monkeypatch) -> None:
    sampler = make_sampler(twin)
    state, path = sampler.prefill("x"), tmp_path / "state"
    sampler.save_state(path, state)
    before = path.read_bytes()
    with pytest.raises(DestinationError, match="exists; pass force=True to replace it"):
        sampler.save_state(path, state)
    with pytest.raises(DestinationError, match="cannot write"):
        sampler.save_state(tmp_path / "nowhere" / "state", state)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DestinationError, match="No space left on device"):
            sampler.save_state(path, sampler.prefill("In the"), force=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["state"]
    sampler.save_state(path, sampler.prefill("In the"), force=True)
    assert path.read_bytes() != before


def test_damaged_files(tmp_path) -> None:
    twin = next(name for name in SUBMODULES if name)
    pytest.importorskip(SUBMODULES[twin])
    sampler = make_sampler(twin)
    path = tmp_path / "state"
    sampler.save_state(path, sampler.prefill("In the beginning"))
    data = path.read_bytes()
    for length in (0, 5, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(StateError, match="is no complete state file"):
            sampler.load_state(path)
    path.write_bytes(b"no state at all" * 100)
    with pytest.raises(StateError, match="is no complete state file"):
        sampler.load_state(path)
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(StateError, match="is no complete state file"):
        sampler.load_state(path)
    save_file({"x": np.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(StateError, match="is no state: its header says 'pt'"):
        sampler.load_state(path)
    # An array left out: all of its names are told.
    path.write_bytes(data)
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    import json

    arrays = load_file(path)
    del arrays["blocks.0.rg_lru_state"]
    save_file(arrays, path, json.loads(header)["__metadata__"])
    with pytest.raises(StateError, match=r"missing blocks\.0\.rg_lru_state"):
        sampler.load_state(path)
    with pytest.raises(FileNotFoundError):
        sampler.load_state(tmp_path / "nothing")


def test_states_of_other_models(twin: str, tmp_path) -> None:
    sampler = make_sampler(twin)
    config = dataclasses.replace(CONFIG, attention_window_size=9, mlp_expanded_width=50)
    other = make_sampler(twin, config=config)
    sampler.save_state(tmp_path / "state", sampler.prefill("x"))
    differences = "mlp_expanded_width is 48, the model has 50; attention_window_size is 8, the"
    with pytest.raises(StateError, match=f"is the state of another model: {differences}"):
        other.load_state(tmp_path / "state")
    state = sampler.prefill("x")
    for use in (
        lambda: other.generate(state, 1),
        lambda: other.stream(state, 1),
        lambda: other.prefill("y", state),
        lambda: other.save_state("x", state),
    ):
        with pytest.raises(StateError, match="this is the state of another model: mlp_expanded_"):
            use()
    for nothing in (empty_state(CONFIG, 1), empty_state(CONFIG, 0)):
        for use in (
            lambda: sampler.generate(nothing, 1),  # noqa: B023
            lambda: sampler.stream(nothing, 1),  # noqa: B023
            lambda: sampler.prefill("y", nothing),  # noqa: B023
            lambda: sampler.save_state("x", nothing),  # noqa: B023
        ):
            with pytest.raises(StateError, match="this is the state of nothing: prefill makes"):
                use()
    with pytest.raises(StateError, match="a State is expected, got str"):
        sampler.generate("x", 1)
    with pytest.raises(StateError, match="a stream goes on from a state of one row, got 2"):
        sampler.stream(sampler.prefill(["x", "y"]), 1)
    for texts in ([], ["x", "y", "z"]):
        with pytest.raises(StateError, match=f"{len(texts)} texts cannot go on 2 rows"):
            sampler.prefill(texts, sampler.prefill(["x", "y"]))


def test_states_of_the_other_framework(twin: str) -> None:
    for submodule in SUBMODULES.values():
        pytest.importorskip(submodule, reason="parity needs both frameworks")
    sampler, state = make_sampler(twin), make_sampler(OTHER[twin]).prefill("x")
    for use in (
        lambda: sampler.generate(state, 1),
        lambda: sampler.stream(state, 1),
        lambda: sampler.prefill("y", state),
        lambda: sampler.save_state("x", state),
    ):
        with pytest.raises(StateError, match=r"another framework's sampler.* save_state .* load_s"):
            use()
