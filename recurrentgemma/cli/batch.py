"""`recurrentgemma sample --input`: many prompts, a JSON line each, and results likewise."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurrentgemma.cli.sampling_options import SEEDS

if TYPE_CHECKING:
    from recurrentgemma.common.jsonl import Line, ResultFile
    from recurrentgemma.common.sampler import BaseSampler


def run_batch(
    sampler: BaseSampler[Any],
    source: Path,
    results: ResultFile,
    *,
    batch_size: int,
    keep_going: bool,
    seed: int | None,
    options: dict[str, Any],
) -> int:
    """Continues every prompt of a file that has no result yet; how many lines were wrong.

    Line n draws with the seed `seed + n`, so that results do not depend on what ran before.

    Raises:
      LineError: A line is no prompt, and `keep_going` is not set.
      OutputError: `results` holds those of other prompts, or cannot be written.
    """
    from recurrentgemma.common.jsonl import LineError, read_lines

    done = {result["line"] for result in results.finished}
    _require_same_prompts(source, results)
    with source.open("rb") as file:
        total = sum(1 for _ in file)
    errors = 0
    with _progress(total, len(done)) as advance:
        left = (line for line in read_lines(source) if line.number not in done)
        while lines := list(itertools.islice(left, batch_size)):
            wrong = next((line for line in lines if line.error), None)
            if wrong and not keep_going:
                lines = lines[: lines.index(wrong)]
            for result in _results(sampler, lines, seed, options):
                results.write(result)
                errors += "error" in result
                advance()
            if wrong and not keep_going:
                raise LineError(wrong.error)
    return errors


def _results(
    sampler: BaseSampler[Any], lines: list[Line], seed: int | None, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    prompts = [line for line in lines if line.error is None]
    seeds = None if seed is None else [(seed + line.number) % SEEDS for line in prompts]
    out = sampler([line.prompt for line in prompts], rng=seeds, **options)
    samples = options["num_samples"]
    row = 0
    for line in lines:
        if line.error is not None:
            yield {"line": line.number, "error": line.error}
            continue
        result: dict[str, Any] = {"line": line.number, "prompt": line.prompt}
        if seeds is not None:
            result["seed"] = seeds[row]
        rows = range(row * samples, (row + 1) * samples)
        result["samples"] = [sample_fields(out, r) for r in rows]
        row += 1
        yield result


def sample_fields(out: Any, row: int) -> dict[str, Any]:
    """One row of a sampler's output as JSON values."""
    fields: dict[str, Any] = {
        "text": out.text[row],
        "tokens": [int(token) for token in out.tokens[row]],
        "finish_reason": out.finish_reasons[row],
    }
    if out.logprobs is not None:
        fields["logprobs"] = logprob_fields(out.logprobs[row])
    return fields


def logprob_fields(logprobs: Any) -> dict[str, Any]:
    """Log-probabilities as JSON values."""
    return {name: part.tolist() for name, part in logprobs._asdict().items()}


def _require_same_prompts(source: Path, results: ResultFile) -> None:
    from recurrentgemma.common.jsonl import OutputError, read_lines

    known = {result["line"]: result.get("prompt") for result in results.finished}
    if not known:
        return
    prompts = {line.number: line.prompt for line in read_lines(source) if not line.error}
    for number, prompt in known.items():
        if prompt is not None and prompts.get(number) != prompt:
            raise OutputError(
                f"{results.path} holds the result of another prompt than line {number} of "
                f"{source}; --force replaces it"
            )


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[], object]]:
    """A progress bar on stderr, if that is a terminal; what it yields moves it on."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("sampling", total=total, completed=done)
        yield lambda: bar.advance(task)
