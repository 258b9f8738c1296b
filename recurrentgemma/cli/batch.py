"""`recurrentgemma sample --input`: many prompts, one JSON line each, and one for each result."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from recurrentgemma.cli.paths import read_source, source_name
from recurrentgemma.cli.sampling_options import SEEDS
from recurrentgemma.common.io.files import expanded
from recurrentgemma.common.io.jsonl import (
    STDIO,
    Line,
    LineError,
    OutputError,
    ResultFile,
    read_lines,
)
from recurrentgemma.common.messages import encode_messages, read_messages

if TYPE_CHECKING:
    from recurrentgemma.common.generation.sampler import BaseSampler
    from recurrentgemma.common.generation.strategies import Sampling
    from recurrentgemma.common.model.state import State


class PromptFiles(NamedTuple):
    """Prompts, and where their results go.

    Attributes:
      lines: The lines of the input.
      results: The output, which nothing has changed yet.
    """

    lines: list[Line]
    results: ResultFile


def open_batch(source: Path, output: Path, *, force: bool) -> PromptFiles:
    """Reads the whole input, and what the output already holds; - is stdin and stdout.

    Raises:
      OSError: The input cannot be read.
      OutputError: The output is the input, holds anything but results of these prompts, or cannot
        be written.
    """
    source, output = expanded(source), expanded(output)
    name = source_name(source)
    lines = read_lines(read_source(source, "prompts as JSON lines"), name)
    if _is_one_file(source, output):
        raise OutputError(f"--input and --output are one file, {output}: give another --output")
    results = ResultFile(output, force=force)
    asked = {line.number: line.asked for line in lines if not line.error}
    for number, result in results.finished.items():
        if "error" not in result and Line(number, result, None).asked != asked.get(number):
            raise OutputError(
                f"{output} holds the result of another prompt than line {number} of {name}; "
                "--force replaces it"
            )
    return PromptFiles(lines, results)


def recorded_options(sampling: Sampling, **others: Any) -> dict[str, Any]:
    """What a result depends on, as JSON values by the names of the options."""
    options = others | {"temperature": 0.0} | dataclasses.asdict(sampling)
    return json.loads(json.dumps(options))  # lists for tuples, as a file holds them


def run_batch(
    sampler: BaseSampler[Any],
    batch: PromptFiles,
    *,
    batch_size: int,
    keep_going: bool,
    seed: int | None,
    state: State | None,
    options: dict[str, Any],
    record: dict[str, Any],
) -> int:
    """Continues every prompt that has no result yet; returns how many lines are no prompts.

    Line n draws with the seed `seed + n`, so that results do not depend on what ran before.

    Args:
      sampler: Continues the prompts.
      batch: The prompts and their results.
      batch_size: Prompts at a time.
      keep_going: Whether a line that is no prompt gets an error as its result.
      seed: The seed of the draws.
      state: The state that each prompt is added to, if any.
      options: The options of the sampler.
      record: `recorded_options`, written beside the first result.

    Raises:
      LineError: A line is no prompt, and `keep_going` is not set.
      OutputError: The results were made with other options, or cannot be written.
    """
    lines, results = batch
    _require_same_options(results, record)
    talks = next((line.number for line in lines if "messages" in line.asked), None)
    if talks is not None and not sampler.is_it_model:
        raise LineError(f"line {talks} has messages, which need --chat")
    # A line that had an error before and is a prompt now is done again.
    done = {
        line.number
        for line in lines
        if (result := results.finished.get(line.number)) and (line.error or "error" not in result)
    }
    left = (line for line in lines if line.number not in done)
    told = any("options" in result for result in results.finished.values())
    tokens, started = 0, time.perf_counter()
    with results, _progress(len(lines), len(done), results) as advance:
        while some := list(itertools.islice(left, batch_size)):
            wrong = next((line for line in some if line.error), None)
            if wrong and not keep_going:
                some = some[: some.index(wrong)]
            for result in _results(sampler, some, seed, state, options):
                if "error" not in result and not told:
                    result["options"], told = record, True
                results.write(result)
                tokens += sum(len(sample["tokens"]) for sample in result.get("samples", ()))
                advance()
            if wrong and not keep_going:
                raise LineError(wrong.error)
    wrong_lines = sum(line.error is not None for line in lines)
    _tell(len(lines), len(done), wrong_lines, tokens, time.perf_counter() - started)
    return wrong_lines


def _tell(lines: int, done: int, wrong: int, tokens: int, seconds: float) -> None:
    """Sums up on stderr what was done."""
    parts = [f"{lines} line{'' if lines == 1 else 's'}"]
    parts += [f"{done} done before"] if done else []
    parts += [f"{wrong} with an error"] if wrong else []
    speed = f" ({tokens / seconds:.1f} tokens/s)" if tokens else ""
    sys.stderr.write(f"{', '.join(parts)}: {tokens} tokens in {seconds:.2f} s{speed}\n")


def _results(
    sampler: BaseSampler[Any],
    lines: list[Line],
    seed: int | None,
    state: State | None,
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    prompts = [line for line in lines if line.error is None]
    seeds = None if seed is None else [(seed + line.number) % SEEDS for line in prompts]
    texts = [_prompt(sampler, line) for line in prompts]
    if state is None or not texts:
        out = sampler(texts, rng=seeds, **options)
    else:
        out = sampler.generate(sampler.prefill(texts, state), rng=seeds, **options)
    samples = options["num_samples"]
    row = 0
    for line in lines:
        if line.error is not None:
            yield {"line": line.number, "error": line.error}
            continue
        result: dict[str, Any] = {"line": line.number, **line.fields}
        if seeds is not None:
            result["seed"] = seeds[row]
        rows = range(row * samples, (row + 1) * samples)
        result["samples"] = [sample_fields(out, r) for r in rows]
        row += 1
        yield result


def _prompt(sampler: BaseSampler[Any], line: Line) -> Any:
    """What a line asks for: a text, or token ids."""
    (asked,) = line.asked.values()
    if "messages" not in line.asked:
        return asked
    allowed = sampler.allow_control_tokens
    turns = encode_messages(
        read_messages(asked, answered=False), sampler.tokenizer, allow_control_tokens=allowed
    )
    return [token for tokens, _ in turns for token in tokens]


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


def _is_one_file(source: Path, output: Path) -> bool:
    """Whether both are the same regular file, by whatever names."""
    if output == STDIO:
        return False
    try:
        read = os.fstat(sys.stdin.fileno()) if source == STDIO else os.stat(source)
        return stat.S_ISREG(read.st_mode) and os.path.samestat(read, os.stat(output))
    except OSError:  # there is no output yet, or stdin is no file
        return False


def _require_same_options(results: ResultFile, record: dict[str, Any]) -> None:
    """Raises `OutputError` if results were made with other options; old ones have no record."""
    for result in results.finished.values():
        before = result.get("options")
        if not isinstance(before, dict) or before == record:
            continue
        differences = [
            f"--{name.replace('_', '-')} was {json.dumps(before[name])}, is {json.dumps(value)}"
            for name, value in record.items()
            if name in before and before[name] != value
        ]
        if differences:
            raise OutputError(
                f"{results.path} holds results of other options: {'; '.join(differences)}; "
                "--force begins anew"
            )


@contextlib.contextmanager
def _progress(total: int, done: int, results: ResultFile) -> Iterator[Callable[[], object]]:
    """A progress bar on stderr if that is a terminal; the function that it yields moves it on."""
    if not sys.stderr.isatty() or results.path == STDIO:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("sampling", total=total, completed=done)
        yield lambda: bar.advance(task)
