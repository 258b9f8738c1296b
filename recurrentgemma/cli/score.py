"""`recurrentgemma score`: how likely a model finds a text."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from recurrentgemma.cli.console import working
from recurrentgemma.cli.frameworks import (
    Checkpoint,
    DTypeOption,
    FrameworkOption,
    choose_framework,
    find_checkpoint,
    load_sampler,
)
from recurrentgemma.cli.paths import named_path, read_source, source_name
from recurrentgemma.common.errors import UserError
from recurrentgemma.common.io.files import expanded


def score(
    file: Annotated[
        Path,
        typer.Argument(help="A UTF-8 text; - reads stdin.", metavar="FILE", parser=named_path),
    ],
    framework: FrameworkOption = None,
    checkpoint: Checkpoint = None,
    dtype: DTypeOption = None,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Print a line a token before the summary.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with every token.")
    ] = False,
) -> None:
    """Print the perplexity of a text and its log-probability (natural logarithm)."""
    from recurrentgemma.common.generation.strategies import Greedy

    file = expanded(file)
    name = source_name(file)
    data = read_source(file, "text")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} must be UTF-8 text, got byte 0x{data[error.start]:02x} at {error.start}"
        ) from error
    framework = choose_framework(framework)
    path, tokenizer = find_checkpoint(checkpoint)
    with working(f"Loading {path.name} with {framework}"):
        loaded = load_sampler(framework, path, tokenizer, Greedy(), dtype, False)
    with working(f"Reading {name}"):
        (result,) = loaded.sampler.score([text])
    pieces = [tokenizer.vocab.id_to_piece(token) for token in result.tokens]
    perplexity = None if math.isnan(result.perplexity) else result.perplexity
    bits = -result.total / math.log(2) / len(data) if data else None
    if as_json:
        report = {
            "file": str(file),
            "tokens": result.tokens,
            "pieces": pieces,
            "logprobs": result.logprobs.tolist(),
            "logprob": result.total,
            "perplexity": perplexity,
            "bits_per_byte": bits,
            "framework": framework,
            "device": loaded.device,
            "dtype": loaded.dtype,
        }
        sys.stdout.write(json.dumps(report) + "\n")
        return
    if per_token:
        for piece, logprob in zip(pieces, result.logprobs, strict=True):
            sys.stdout.write(f"{logprob:9.4f}  {piece!r}\n")  # in quotes: a piece may be a newline
    summary = f"{len(pieces)} tokens, log-probability {result.total:.4f}"
    if perplexity is not None and bits is not None:
        summary += f", perplexity {perplexity:.4f}, {bits:.4f} bits a byte"
    sys.stdout.write(summary + "\n")
