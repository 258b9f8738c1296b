"""`recurrentgemma sample`: what it prints is what the samplers return."""

import io
import json
import sys

import pytest

from recurrentgemma.cli import main

PROMPT = "It was a truth"


def library_text(framework: str, path, prompt: str, steps: int) -> str:
    """The greedy continuation by the Python API in float32."""
    from recurrentgemma.common.io.checkpoint import load_tokenizer

    vocab = load_tokenizer(path).vocab
    if framework == "torch":
        import torch

        from recurrentgemma.torch import Sampler, load_checkpoint

        sampler = Sampler(load_checkpoint(path, dtype=torch.float32), vocab)
    else:
        import jax.numpy as jnp

        from recurrentgemma.jax import Sampler, load_checkpoint

        model, params = load_checkpoint(path, dtype=jnp.float32)
        sampler = Sampler(model, vocab, params)
    return sampler([prompt], steps).text[0]


@pytest.fixture
def sample(cli, checkpoint):
    """Runs `recurrentgemma sample` on the random checkpoint for few tokens."""

    def run(*args: str, stdin: bytes = b"", steps: int = 12, path=checkpoint):
        return cli(
            "sample", "--checkpoint", path, "--max-new-tokens", str(steps), *args, stdin=stdin
        )

    return run


def test_text_is_the_samplers(sample, framework, checkpoint):
    done = sample(PROMPT, "--framework", framework, steps=30)
    text = library_text(framework, checkpoint, PROMPT, 30)
    assert (done.code, done.out) == (0, PROMPT + text + "\n")
    speed, about = done.err.splitlines()
    assert speed.startswith("30 tokens at ")
    assert "tokens/s, first after" in speed
    assert about == f"{framework}, float32 on cpu"
    assert sample(PROMPT, "--framework", framework, "--no-echo", steps=30).out == text + "\n"


@pytest.mark.usefixtures("both_frameworks")
def test_frameworks_agree(sample):
    torch, jax = (sample(PROMPT, "--json", "--framework", f).json for f in ("torch", "jax"))
    assert torch["tokens"] == jax["tokens"]
    assert torch["text"] == jax["text"]
    assert sample(PROMPT, "--json").json["framework"] == "torch"


def test_bundled_model(cli, bundled, framework):
    args = ("sample", PROMPT, "--framework", framework, "--max-new-tokens", "24")
    text = library_text(framework, bundled, PROMPT, 24)
    assert cli(*args).out == PROMPT + text + "\n"
    assert cli(*args, "--json").json["text"] == text


def test_text_comes_piece_by_piece(monkeypatch, checkpoint):
    flushed = []

    class Recorder(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Recorder())
    assert main(["sample", PROMPT, "--checkpoint", str(checkpoint), "--max-new-tokens", "20"]) == 0
    assert flushed[0] == PROMPT
    assert len(set(flushed)) > 12  # a token need not add text


def test_prompt_from_stdin(sample):
    expected = sample("Ünd so").out
    for args in ([], ["-"]):
        assert sample(*args, stdin="Ünd so\n".encode()).out == expected
    # An empty argument is an empty prompt, not stdin.
    assert sample("", "--json", stdin=b"Not this").json["prompt"] == ""
    assert sample("--json").json["prompt"] == ""
    assert sample("--json", stdin=b"two\n\n").json["prompt"] == "two\n"


def test_json(sample, framework, tokenizer):
    done = sample(PROMPT, "--json", "--framework", framework).json
    timings = done.pop("timings")
    tokens = done.pop("tokens")
    assert len(tokens) == 12
    assert done == {
        "prompt": PROMPT,
        "text": tokenizer.decode(tokens),
        "finish_reason": "length",
        "framework": framework,
        "device": "cpu",
        "dtype": "float32",
        "seed": None,
    }
    assert set(timings) == {"load_s", "first_token_s", "tokens_per_second"}
    assert min(timings.values()) > 0


def test_no_tokens(sample):
    done = sample(PROMPT, steps=0)
    assert done.out == PROMPT + "\n"
    assert done.err.startswith("0 tokens, first after")
    done = sample(PROMPT, "--json", steps=0).json
    assert (done["tokens"], done["text"], done["finish_reason"]) == ([], "", "length")
    assert done["timings"]["tokens_per_second"] is None


def test_finish_reason(sample, stopping, framework, tokenizer):
    args = ("a", "--json", "--framework", framework)
    done = sample(*args, path=stopping).json
    assert (done["tokens"], done["finish_reason"]) == ([tokenizer.eos_id], "eos")
    done = sample(*args, "--chat", path=stopping).json
    assert (done["tokens"], done["finish_reason"]) == ([tokenizer.end_of_turn_id], "end_of_turn")
    # The reply stands apart from the prompt.
    assert sample("a", "--chat", path=stopping).out == "a\n\n"


def test_seeds(sample, framework):
    def draw(*args: str):
        return sample(PROMPT, "--json", "--framework", framework, *args).json

    first = draw("--temperature", "1.5", "--seed", "3")
    assert first["seed"] == 3
    assert draw("--temperature", "1.5", "--seed", "3")["tokens"] == first["tokens"]
    assert draw("--temperature", "1.5", "--seed", "4")["tokens"] != first["tokens"]
    fresh = draw("--temperature", "1.5")
    again = draw("--temperature", "1.5", "--seed", str(fresh["seed"]))
    assert again["tokens"] == fresh["tokens"]
    assert draw("--temperature", "1.5")["seed"] != fresh["seed"]
    done = sample(PROMPT, "--framework", framework, "--top-k", "5", "--seed", "7")
    assert done.err.endswith(", seed 7\n")


def test_greedy_or_not(sample):
    greedy = sample(PROMPT, "--json").json
    cold = sample(PROMPT, "--json", "--temperature", "0", "--top-k", "9").json
    assert (cold["tokens"], cold["seed"]) == (greedy["tokens"], None)
    # A cut-off without a temperature draws at temperature 1.
    likeliest = sample(PROMPT, "--json", "--top-k", "1").json
    assert likeliest["tokens"] == greedy["tokens"]
    assert likeliest["seed"] is not None
    args = (PROMPT, "--json", "--top-p", "0.9", "--seed", "1")
    assert sample(*args).json["tokens"] == sample(*args, "--temperature", "1").json["tokens"]
    assert sample(*args).json["tokens"] != greedy["tokens"]


def test_penalties_and_biases(sample):
    def tokens(*args: str) -> list[int]:
        return sample(PROMPT, "--json", *args, steps=6).json["tokens"]

    biased = ("--logit-bias", "9=300", "--logit-bias", "8=290")
    assert tokens(*biased) == [9] * 6
    assert tokens(*biased, "--presence-penalty", "50") == [9, 8] + [9] * 4
    drawn = ("--frequency-penalty", "50", "--temperature", "0.1")
    assert tokens(*biased, *drawn) == [9, 8] * 3


def test_bfloat16(sample, framework):
    done = sample(PROMPT, "--json", "--dtype", "bfloat16", "--framework", framework, steps=1).json
    assert done["dtype"] == "bfloat16"
    assert len(done["tokens"]) == 1


def test_terminals_that_lack_characters(monkeypatch, checkpoint):
    def run(*args: str) -> str:
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", out)
        command = ["sample", "“É”", "--checkpoint", str(checkpoint), "--max-new-tokens", "2"]
        assert main([*command, *args]) == 0
        out.seek(0)
        return out.read()

    assert run().startswith("???")
    assert json.loads(run("--json"))["prompt"] == "“É”"
