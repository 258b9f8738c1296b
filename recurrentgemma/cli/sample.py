"""`recurrentgemma sample`: continues a prompt."""

from __future__ import annotations

import json
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recurrentgemma.cli.console import read_stdin, working
from recurrentgemma.cli.frameworks import DType, Framework, choose_framework, load_sampler
from recurrentgemma.cli.generation import generate

if TYPE_CHECKING:
    from recurrentgemma.common.sampling import Sampling

_SEEDS = 2**32  # more than 32 bits JAX would cut off


def sample(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="Text to continue; - or none reads stdin.", metavar="PROMPT", show_default=False
        ),
    ] = None,
    framework: Annotated[
        Framework | None,
        typer.Option(help="Default: torch if it is installed, or else jax.", show_default=False),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint folder. Default: the bundled model.",
            metavar="PATH",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Stop after N tokens.", metavar="N")
    ] = 100,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Draw from softmax(logits / T); 0 takes the likeliest token. "
            "Default: 0, or 1 beside --top-k or --top-p.",
            metavar="T",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Draw from the K likeliest tokens.", metavar="K", show_default=False),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from the fewest tokens that have probability P together.",
            metavar="P",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Same seed, same draws. Default: a fresh one, which is reported.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(help="Default: float32 on CPU, or else bfloat16.", show_default=False),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat/--no-chat", help="Put the prompt to an instruction-tuned model as a turn."
        ),
    ] = False,
    echo: Annotated[
        bool, typer.Option("--echo/--no-echo", help="Print the prompt before its continuation.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
) -> None:
    """Continue a prompt, token by token.

    The text goes to stdout as it is generated, the speed to stderr after it.
    """
    from recurrentgemma.common.checkpoint import BUNDLED
    from recurrentgemma_conversion import open_checkpoint

    sampling, seed = _sampling(temperature, top_k, top_p, seed)
    framework = choose_framework(framework)
    path = checkpoint or BUNDLED
    with open_checkpoint(path) as opened:
        tokenizer = opened.load_tokenizer()
    if chat and tokenizer.end_of_turn_id is None:
        raise ValueError(f"--chat: {path} has no <end_of_turn>, so it was not tuned to chat")
    text = _prompt(prompt)
    started = time.perf_counter()
    with working(f"Loading {path.name} with {framework}"):
        loaded = load_sampler(framework, path, tokenizer, sampling, dtype, chat)
    load_s = time.perf_counter() - started
    steps = loaded.sampler.stream(text, max_new_tokens, rng=seed)
    shown = text + "\n" * chat if echo else ""
    run = generate(steps, None if as_json else shown)
    timings = {
        "load_s": load_s,
        "first_token_s": run.first_token_s,
        "tokens_per_second": run.tokens_per_second,
    }
    if as_json:
        stops = {tokenizer.eos_id: "eos"} | (
            {tokenizer.end_of_turn_id: "end_of_turn"} if chat else {}
        )
        report = {
            "prompt": text,
            "text": run.text,
            "tokens": run.tokens,
            "finish_reason": stops.get(run.tokens[-1] if run.tokens else -1, "length"),
            "framework": framework,
            "device": loaded.device,
            "dtype": loaded.dtype,
            "seed": seed,
            "timings": timings,
        }
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        about = f"{framework}, {loaded.dtype} on {loaded.device}"
        about += f", seed {seed}" if seed is not None else ""
        sys.stderr.write(f"{run.speed}, loaded in {load_s:.2f} s\n{about}\n")


def _sampling(
    temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None
) -> tuple[Sampling, int | None]:
    """The strategy that the options ask for, and the seed of its draws if it makes any."""
    from recurrentgemma.common.sampling import Categorical, Greedy

    if seed is not None and not 0 <= seed < _SEEDS:
        raise ValueError(f"--seed must be at least 0 and below {_SEEDS}, got {seed}")
    # Also where greedy, so that a wrong value is never passed over.
    categorical = Categorical(temperature or 1.0, top_k, 1.0 if top_p is None else top_p)
    if temperature == 0 or (temperature is None and top_k is None and top_p is None):
        return Greedy(), seed
    return categorical, secrets.randbelow(_SEEDS) if seed is None else seed


def _prompt(argument: str | None) -> str:
    """The prompt, from the argument or from stdin."""
    if argument is None or argument == "-":
        return read_stdin()
    try:
        argument.encode()
    except UnicodeEncodeError as error:  # from bytes that Python could not decode
        raise ValueError("the prompt must be UTF-8 text") from error
    return argument
