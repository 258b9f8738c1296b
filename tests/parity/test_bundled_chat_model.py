"""The bundled chat model gives the right answers in both frameworks, and ends its turns."""

from itertools import cycle

import numpy as np
import pytest

pytest.importorskip("jax.numpy", reason="jax is not installed")
pytest.importorskip("torch.nn", reason="torch is not installed")

import jax.numpy as jnp
import torch

import recurrentgemma.jax
import recurrentgemma.torch
from recurrentgemma.common.io.arrays import BFLOAT16
from recurrentgemma.common.io.checkpoint import BUNDLED, BUNDLED_CHAT
from recurrentgemma.common.messages import Message, encode_messages
from recurrentgemma_conversion.readers.native import NativeReader

NAME = "tiny-chat"
LONGEST = 40
ANSWERS = {
    ("Who wrote Emma?",): "Jane Austen wrote Emma.",
    ("Which novel is Mr. Darcy in?",): "Mr. Darcy is in Pride and Prejudice.",
    ("Who built the ark?",): "Noah built the ark (Genesis).",
    ("Thank you.",): "You are welcome.",
    ("My name is Clara.", "I am glad to meet you, Clara.", "What is my name?"): (
        "Your name is Clara."
    ),
}


@pytest.fixture(scope="module")
def samplers():
    tokenizer = recurrentgemma.torch.load_tokenizer(NAME)
    model, params = recurrentgemma.jax.load_checkpoint(NAME, dtype=jnp.float32)
    other = recurrentgemma.torch.load_checkpoint(NAME, dtype=torch.float32)
    return {
        "jax": recurrentgemma.jax.Sampler(model, tokenizer, params, is_it_model=True),
        "torch": recurrentgemma.torch.Sampler(other, tokenizer, is_it_model=True),
    }


def test_answers_are_right_and_the_same_in_both_twins(samplers) -> None:
    outs = {}
    for twin, sampler in samplers.items():
        said = [map(Message, cycle(("user", "model")), turns) for turns in ANSWERS]
        prompts = [
            [token for tokens, _ in encode_messages([*talk], sampler.tokenizer) for token in tokens]
            for talk in said
        ]
        out = outs[twin] = sampler(prompts, LONGEST)
        assert out.text == list(ANSWERS.values()), twin
        assert out.finish_reasons == ["end_of_turn"] * len(ANSWERS), twin
    for one, other in zip(outs["jax"].tokens, outs["torch"].tokens, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_folder_is_small_and_stored_in_bfloat16() -> None:
    files = {file.name: file.stat().st_size for file in BUNDLED_CHAT.iterdir()}
    assert sum(files.values()) <= 12_000_000
    assert set(NativeReader(BUNDLED_CHAT).dtypes.values()) == {BFLOAT16}
    assert files.keys() == {file.name for file in BUNDLED.iterdir()}
    for name in ("tokenizer.model", "config.json"):
        assert (BUNDLED_CHAT / name).read_bytes() == (BUNDLED / name).read_bytes()
