"""`recurrentgemma bench`: how fast a model reads and writes, and in how much memory."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recurrentgemma.cli.console import working
from recurrentgemma.cli.frameworks import (
    MODEL,
    Checkpoint,
    Compiled,
    DTypeOption,
    Framework,
    FrameworkOption,
    Quantize,
    choose_framework,
    find_checkpoint,
    load_sampler,
    random_sampler,
)
from recurrentgemma.common.errors import UserError
from recurrentgemma.common.model.presets import Preset, member
from recurrentgemma.common.twin import find_twin

if TYPE_CHECKING:
    from recurrentgemma.common.generation.sampler import BaseSampler

_READ_BYTES, _READS = 2**29, 5


def bench(
    checkpoint: Checkpoint = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"With --random, a published size: {', '.join(p.name for p in Preset)}.",
            metavar="NAME",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    random: Annotated[
        bool,
        typer.Option(
            "--random",
            help="Random weights, for which no checkpoint is needed.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    framework: FrameworkOption = None,
    dtype: DTypeOption = None,
    quantize: Quantize = None,
    compiled: Compiled = False,
    prompt_tokens: Annotated[
        int, typer.Option(min=2, help="Length of each prompt.", metavar="N")
    ] = 2048,
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens to generate a row.", metavar="N")
    ] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows.", metavar="N")] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Print the rates of reading a prompt and of decoding, and the memory it took.

    The times are those of a second run, after one in which everything was compiled.
    """
    from recurrentgemma.common.generation.strategies import Greedy

    if random != (preset is not None):
        raise UserError("--preset NAME and --random go together: a preset has no weights")
    framework = choose_framework(framework)
    with working(f"Loading with {framework}"):
        if preset is not None:
            name = member(Preset, preset.upper()).name
            loaded = random_sampler(framework, name, dtype, quantize, compiled)
        else:
            path, tokenizer = find_checkpoint(checkpoint)
            name = path.name
            loaded = load_sampler(
                framework,
                path,
                tokenizer,
                Greedy(),
                dtype,
                False,
                quantize=quantize,
                compiled=compiled,
            )
    report: dict[str, Any] = {
        "model": name,
        "framework": framework,
        "device": loaded.device,
        "dtype": loaded.dtype,
        "quantize": quantize,
        "compile": compiled or framework is Framework.JAX,
        "batch_size": batch_size,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
    }
    with working("Running"):
        report |= measure(loaded.sampler, batch_size, prompt_tokens, new_tokens)
    report["peak_memory_bytes"] = find_twin(framework).memory() or 0
    size = loaded.sampler.engine.num_bytes
    report["weight_bytes"] = size
    report["weight_bytes_per_second"] = size * report["decode_tokens_per_second"] / batch_size
    with working("Reading memory"):
        report["memory_bytes_per_second"] = memory_rate(framework, loaded.device)
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
        return
    rows = {
        "model": f"{name}, {framework}, {loaded.dtype} on {loaded.device}, {size / 1e9:.2f} GB",
        "prefill": f"{report['prefill_tokens_per_second']:,.1f} tokens/s "
        f"({batch_size} × {prompt_tokens} tokens)",
        "first token": f"after {report['first_token_s']:.3f} s",
        "decode": f"{report['decode_tokens_per_second']:,.1f} tokens/s, "
        f"{report['weight_bytes_per_second'] / 1e9:.1f} GB/s of weights: "
        f"{report['weight_bytes_per_second'] / report['memory_bytes_per_second']:.0%} of the "
        f"{report['memory_bytes_per_second'] / 1e9:.1f} GB/s that memory gives",
        "peak memory": f"{report['peak_memory_bytes'] / 1e6:,.0f} MB",
    }
    for label, value in rows.items():
        sys.stdout.write(f"{label:12} {value}\n")


def measure(
    sampler: BaseSampler[Any], batch_size: int, prompt_tokens: int, new_tokens: int
) -> dict[str, float]:
    """Times of the second of two runs."""
    bursts = max(sampler.engine.burst, sampler.engine.long_burst) > 1  # each is a program
    _run(sampler, batch_size, prompt_tokens, new_tokens if bursts else 2)
    first, rest = _run(sampler, batch_size, prompt_tokens, new_tokens)
    step = rest / (new_tokens - 1)
    return {
        "first_token_s": first,
        # All but the prompt's last token, which the first step reads.
        "prefill_tokens_per_second": batch_size * (prompt_tokens - 1) / max(first - step, 1e-9),
        "decode_tokens_per_second": batch_size / step,
    }


def memory_rate(framework: Framework, device: str) -> float:
    """Bytes a second at which a large array is read: by all cores, or by the accelerator."""
    if device == "cpu":
        import numpy as np

        with ThreadPoolExecutor() as pool:
            parts = np.array_split(np.ones(_READ_BYTES // 4, np.float32), os.cpu_count() or 1)
            return _rate(lambda: list(pool.map(lambda part: part.dot(part), parts)))
    if framework is Framework.TORCH:
        import torch

        values = torch.ones(_READ_BYTES // 4, device=device)
        return _rate(lambda: values.sum().item())
    import jax

    values, total = jax.numpy.ones(_READ_BYTES // 4), jax.jit(jax.numpy.sum)
    return _rate(lambda: total(values).item())


def _rate(read: Callable[[], Any]) -> float:
    """Bytes a second in the median of several runs, after a first one."""
    seconds = []
    for _ in range(_READS + 1):
        started = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - started)
    return _READ_BYTES / statistics.median(seconds[1:])


def _run(
    sampler: BaseSampler[Any], batch_size: int, prompt_tokens: int, new_tokens: int
) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    import numpy as np

    from recurrentgemma.common.model.state import empty_state

    rng = np.random.default_rng(0)
    prompts = rng.integers(sampler.config.vocab_size, size=(batch_size, prompt_tokens))
    state = empty_state(sampler.config, batch_size).extended(prompts.tolist())
    started = time.perf_counter()
    steps = iter(sampler.generation(state, new_tokens, end_sampling_at_eos_token=False))
    next(steps)
    first = time.perf_counter()
    for _ in steps:
        pass
    return first - started, time.perf_counter() - first
