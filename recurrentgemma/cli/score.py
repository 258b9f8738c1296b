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
    Adapter,
    Checkpoint,
    DTypeOption,
    FrameworkOption,
    MeshText,
    Quantize,
    TokenizerFile,
    choose_framework,
    find_checkpoint,
    load_sampler,
    loading,
)
from recurrentgemma.cli.paths import named_path, read_source, source_name
from recurrentgemma.common.io.files import expanded
from recurrentgemma.common.io.text import text_of


def score(
    file: Annotated[
        Path,
        typer.Argument(help="A UTF-8 text; - reads stdin.", metavar="FILE", parser=named_path),
    ],
    framework: FrameworkOption = None,
    checkpoint: Checkpoint = None,
    adapter: Adapter = None,
    quantize: Quantize = None,
    tokenizer: TokenizerFile = None,
    dtype: DTypeOption = None,
    mesh: MeshText = None,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Print a line a token before the summary.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with every token.")
    ] = False,
) -> None:
    """Print the perplexity of a text and its log-probability (natural logarithm)."""
    file = expanded(file)
    name = source_name(file)
    text = text_of(read_source(file, "text"), name)
    framework = choose_framework(framework)
    with working(loading(checkpoint, framework)):
        from recurrentgemma.common.generation.strategies import Greedy  # slow, as all that follows

        path, vocabulary = find_checkpoint(checkpoint, tokenizer)
        loaded = load_sampler(
            framework,
            path,
            vocabulary,
            Greedy(),
            dtype,
            chat=False,
            adapter=adapter,
            quantize=quantize,
            mesh=mesh,
        )
    with working(f"Reading {name}"):
        (result,) = loaded.sampler.score([text])
    pieces = [vocabulary.piece(token) for token in result.tokens]
    perplexity = None if math.isnan(result.perplexity) else result.perplexity
    bits = -result.total / math.log(2) / len(text.encode()) if text else None
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
