"""The bundled checkpoint says the same in both frameworks, in a batch and alone."""

import numpy as np
import pytest
from sweeps import sweep

pytest.importorskip("jax.numpy", reason="jax is not installed")
pytest.importorskip("torch.nn", reason="torch is not installed")

import jax.numpy as jnp
import torch

import recurrentgemma.jax
import recurrentgemma.torch
from recurrentgemma.common.io.arrays import BFLOAT16
from recurrentgemma.common.io.checkpoint import BUNDLED, load_tokenizer
from recurrentgemma_conversion.readers.native import NativeReader

STEPS = sweep(140, 200)  # the window has 128 tokens
PROMPTS = [
    "",
    "In the beginning",
    "And it came to pass",
    "The LORD said to Moses,",
    "Blessed are the",
    "Now the sons of",
    "Behold,",
    "He answered them,",
    "Jesus said to him,",
    "For the king of Babylon had",
    "Therefore I tell you, don't be anxious for your life: what you will eat, or",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune",
    "Emma",
    "Mr. Darcy",
    "Elinor could not",
    "“My dear Fanny,” said Edmund,",
    "She was very much surprised",
    "Captain Wentworth",
    "The ball at Mr. Weston's was given up on the same day that it had been proposed, and",
    "x",
]


@pytest.fixture(scope="module")
def samplers():
    tokenizer = load_tokenizer()
    model, params = recurrentgemma.jax.load_checkpoint(dtype=jnp.float32)
    return {
        "jax": recurrentgemma.jax.Sampler(model, tokenizer, params),
        "torch": recurrentgemma.torch.Sampler(
            recurrentgemma.torch.load_checkpoint(dtype=torch.float32), tokenizer
        ),
    }


def generate(sampler, prompts: list[str]) -> list[np.ndarray]:
    out = sampler(prompts, STEPS, end_sampling_at_eos_token=False)
    assert [len(tokens) for tokens in out.tokens] == [STEPS] * len(prompts)
    return [np.asarray(tokens) for tokens in out.tokens]


@pytest.fixture(scope="module")
def batch(samplers) -> dict[str, list[np.ndarray]]:
    """Every third prompt in the short profile: short, long and empty ones are among them."""
    prompts = PROMPTS[:: sweep(3, 1)]
    return {name: generate(sampler, prompts) for name, sampler in samplers.items()}


def test_greedy_tokens_are_the_same_in_both_twins(batch) -> None:
    assert len(batch["jax"]) == len(batch["torch"]) == sweep(7, 20)
    for jax_tokens, torch_tokens in zip(batch["jax"], batch["torch"], strict=True):
        np.testing.assert_array_equal(jax_tokens, torch_tokens)


@pytest.mark.parametrize("twin", ["jax", "torch"])
def test_greedy_tokens_are_the_same_one_by_one(samplers, batch, twin: str) -> None:
    prompts = list(zip(PROMPTS[:: sweep(3, 1)], batch[twin], strict=True))
    for prompt, tokens in sweep(prompts[-1:], prompts):  # a long one
        (alone,) = generate(samplers[twin], [prompt])
        np.testing.assert_array_equal(tokens, alone, err_msg=prompt)


def test_the_folder_is_small_and_stored_in_bfloat16() -> None:
    size = sum(file.stat().st_size for file in BUNDLED.iterdir())
    assert size <= 12_000_000
    assert set(NativeReader(BUNDLED).dtypes.values()) == {BFLOAT16}
    assert {file.name for file in BUNDLED.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.model",
    }


def test_greedy_text_is_english(samplers) -> None:
    (text,) = samplers["torch"](["In the beginning"], 60).text
    words = text.split()
    common = {"the", "and", "of", "to", "in", "he", "that", "was", "his", "a", "they", "for"}
    assert len(words) > 20
    assert sum(word.strip(".,;:").lower() in common for word in words) > len(words) / 5
