"""Speed and memory on real weights: both twins, `transformers`, and llama.cpp on the same GGUF.

    python benchmarks/checkpoint.py CHECKPOINT --output benchmarks/results/NAME
    python benchmarks/checkpoint.py gemma.gguf --llamacpp ENVIRONMENT/bin/python

CHECKPOINT is of any format that both `convert` and `transformers` know. It is converted to a
folder of Hugging Face's in float32, which the twins and `transformers` read; llama.cpp (the package
`xllamacpp`, here or in another environment) reads a GGUF as it is, in few bits.

"prefill" reads a prompt and gives the logits after its last token. "decode" reads one token after
another behind a text that has been read. Contenders take turns, each in its own process, on as many
cores as `--threads` says. The peak memory is that of the longest prefill, in a process that does
nothing else; its rise is above what the process had with the model loaded. There each contender
also says which token it chooses, and those in float32 must agree. The bytes a token are those of
the weights that decoding reads, and of the keys, values and states.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import Task, Worker, measure, publish, serve, spread

PEER, LLAMA = "transformers", "llama.cpp"
FIRST_ID, LAST_ID = 1_000, 30_000  # plain text in every vocabulary that is large
SMALLEST = 64  # ids of a small one


def prompt(length: int, vocab_size: int) -> list[int]:
    """Random token ids behind BOS."""
    low, high = (FIRST_ID, LAST_ID) if vocab_size > LAST_ID else (SMALLEST, vocab_size)
    ids = np.random.default_rng(0).integers(low, high, length - 1)
    return [2, *ids.tolist()]


class Contender:
    """Tasks: read a prompt; add tokens to a text one by one."""

    vocab_size: int
    weights: int | None = None  # bytes, where they are not those of the checkpoint

    def __init__(self, path: Path, flags: argparse.Namespace) -> None:
        self.steps = flags.steps
        # What the warm-up, the first call and the counted calls of `measure` append.
        self.most = flags.steps * (2 * flags.rounds + 3)

    def prefill(self, ids: list[int]) -> int | float:
        """Reads a prompt; returns the likeliest next token, or the seconds that it took."""
        raise NotImplementedError

    def decode(self, ids: list[int]) -> Task:
        """Reads a text, and returns the task that reads so many tokens behind it."""
        raise NotImplementedError


class Ours(Contender):
    """A twin, through its engine as the sampler uses it."""

    def __init__(
        self,
        path: Path,
        flags: argparse.Namespace,
        framework: str,
        quantize: str | None = None,
        **sampler: Any,
    ) -> None:
        super().__init__(path, flags)
        from recurrentgemma.common.twin import find_twin

        twin = find_twin(framework)
        model = twin.load(path, "float32", quantize=quantize, decoding=1)
        vocab = _Ids(model.config.vocab_size)
        self.sampler, self.vocab_size = twin.sampler(model, vocab, **sampler), vocab.size
        self.weights = self.sampler.engine.num_bytes if quantize else None

    def prefill(self, ids):
        return int(self.sampler([ids], 1, end_sampling_at_eos_token=False).tokens[0][0])

    def decode(self, ids):
        engine = self.sampler.engine
        cache = engine.begin(1, engine.capacity_for(len(ids) + self.most))
        for start in range(0, len(ids), 512):
            tokens = np.array([ids[start : start + 512]], np.int32)
            places = np.arange(start, start + tokens.shape[1], dtype=np.int32)[None]
            cache = engine.prefill(cache, tokens, places)
        state = {"cache": cache, "place": len(ids)}

        def run() -> None:
            for _ in range(self.steps):
                token = engine.on_device(np.array([5], np.int32))
                place = engine.on_device(np.array([state["place"]], np.int32))
                logits, state["cache"] = engine.feed(state["cache"], token, place)
                engine.on_host(logits[:, :1])
                state["place"] += 1

        return run


class _Ids:
    """A vocabulary of token ids alone."""

    def __init__(self, size: int) -> None:
        self.size = size

    def EncodeAsIds(self, text: str, /) -> list[int]:
        return [3] * len(text)

    def DecodeIds(self, ids: list[int], /) -> str:
        return " ".join(map(str, ids))

    def GetPieceSize(self) -> int:
        return self.size

    def bos_id(self) -> int:
        return 2

    def eos_id(self) -> int:
        return 1

    def pad_id(self) -> int:
        return 0


class Transformers(Contender):
    """`transformers`, one call for each prompt and token."""

    def __init__(self, path: Path, flags: argparse.Namespace) -> None:
        super().__init__(path, flags)
        import torch
        import transformers

        torch.set_grad_enabled(False)
        auto = transformers.AutoModelForCausalLM
        self.model = auto.from_pretrained(path, dtype=torch.float32).eval()
        self.vocab_size = self.model.config.vocab_size

    def _run(self, ids: list[int], **settings: Any) -> Any:
        import torch

        return self.model(torch.tensor([ids]), use_cache=True, logits_to_keep=1, **settings)

    def prefill(self, ids):
        return int(self._run(ids).logits[0, -1].argmax())

    def decode(self, ids):
        import transformers

        from recurrentgemma.parity.transformers_model import with_cache

        given = with_cache(self.model, transformers.DynamicCache(config=self.model.config))
        self._run(ids, **given)

        def run() -> None:
            for _ in range(self.steps):
                self._run([5], **given)

        return run


class LlamaCpp(Contender):
    """llama.cpp, which times prompts and tokens itself."""

    def __init__(self, path: Path, flags: argparse.Namespace) -> None:
        super().__init__(path, flags)
        import xllamacpp  # pyright: ignore[reportMissingImports]

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = max(*flags.prefill, *flags.decode) + flags.steps + 64
        settings.n_parallel, settings.warmup = 1, False
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = flags.threads
        self.server, self.vocab_size = xllamacpp.Server(settings), LAST_ID + 1

    def _timings(self, ids: list[int], tokens: int, *, keep: bool) -> dict[str, float]:
        options = {"temperature": 0.0, "ignore_eos": True, "cache_prompt": keep}
        return self.server.handle_completions({"prompt": ids, "n_predict": tokens, **options})[
            "timings"
        ]

    def prefill(self, ids):
        return self._timings(ids, 1, keep=False)["prompt_ms"] / 1e3

    def decode(self, ids):
        return lambda: (
            self._timings(ids, self.steps, keep=True)["predicted_per_token_ms"] * self.steps / 1e3
        )


CONTENDERS: dict[str, Callable[..., Contender]] = {
    "jax": lambda path, flags: Ours(path, flags, "jax"),
    "torch": lambda path, flags: Ours(path, flags, "torch"),
    "torch, step compiled": lambda path, flags: Ours(path, flags, "torch", jit_compile=True),
    "jax, q8": lambda path, flags: Ours(path, flags, "jax", "q8"),
    "torch, q8": lambda path, flags: Ours(path, flags, "torch", "q8"),
    "torch, q4": lambda path, flags: Ours(path, flags, "torch", "q4"),
    PEER: Transformers,
    LLAMA: LlamaCpp,
}


def tasks_of(contender: Contender, flags: argparse.Namespace) -> dict[str, Task]:
    """Every task, by name."""
    texts = {n: prompt(n, contender.vocab_size) for n in (*flags.prefill, *flags.decode)}
    prefills = {
        f"prefill {n:,}": functools.partial(contender.prefill, texts[n]) for n in flags.prefill
    }
    decodes = {f"decode at {n:,}": contender.decode(texts[n]) for n in flags.decode}
    return prefills | decodes


def peak_memory(contender: Contender, length: int) -> dict[str, Any]:
    """The memory of a process before and after it reads a prompt, and the token it chooses."""

    def resident() -> int:
        # Not `ru_maxrss`, in which a process begins with the most that its parent had.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    before = resident()
    chosen = contender.prefill(prompt(length, contender.vocab_size))
    weights = contender.weights
    return {"before": before, "peak": resident(), "token": chosen, "weights": weights}


def bytes_per_token(source: Path, lengths: list[int]) -> dict[str, list[int]]:
    """The bytes of weights and state that decoding behind each length reads, by kind."""
    from recurrentgemma.common.model.layer_spec import num_parameters
    from recurrentgemma.common.model.memory import state_bytes
    from recurrentgemma_conversion import Format, open_checkpoint

    with open_checkpoint(source) as checkpoint:
        config, stored = checkpoint.config, checkpoint.stored_bytes
        is_gguf = checkpoint.format is Format.GGUF
    weights = 4 * num_parameters(config)
    wide = [weights + state_bytes(config, "float32", n) for n in lengths]
    found = {"weights": [weights], "float32": wide}
    if is_gguf:  # there keys and values have 16 bits
        found[LLAMA] = [stored + state_bytes(config, "bfloat16", n) for n in lengths]
    return found


def main() -> None:
    """Measures every contender; prints ratios, then medians with quartiles."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("checkpoint", type=Path)
    add("--rounds", type=int, default=3, help="turns of each contender (3)")
    add("--prefill", type=int, nargs="+", default=[512, 8192], help="lengths (512 8192)")
    add("--decode", type=int, nargs="+", default=[1000, 8000], help="lengths (1000 8000)")
    add("--steps", type=int, default=16, help="tokens decoded in a call (16)")
    add("--threads", type=int, default=2, help="cores to use (2)")
    add("--only", nargs="+", choices=CONTENDERS, help="contenders")
    add("--llamacpp", metavar="PYTHON", help="Python of an environment with xllamacpp")
    add("--output", type=Path, help="file for the results, without a suffix")
    add("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    add("--peak", choices=CONTENDERS, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if name := flags.worker or flags.peak:
        contender = CONTENDERS[name](flags.checkpoint, flags)
        if flags.peak:
            print(json.dumps(peak_memory(contender, max(flags.prefill))))
        else:
            serve(tasks_of(contender, flags))
        return
    cores = sorted(os.sched_getaffinity(0))[: flags.threads]
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    with tempfile.TemporaryDirectory() as folder:
        compare(flags, Path(folder) / "float32")


def compare(flags: argparse.Namespace, converted: Path) -> None:
    """Converts the checkpoint, runs every contender, and publishes what comes out."""
    from recurrentgemma_conversion import Format, convert

    convert(flags.checkpoint, converted, Format.HUGGINGFACE, dtype="float32")
    python = flags.llamacpp or (importlib.util.find_spec("xllamacpp") and sys.executable)
    names = [name for name in CONTENDERS if not flags.only or name in flags.only]
    if LLAMA in names and (python is None or flags.checkpoint.suffix != ".gguf"):
        names.remove(LLAMA)
        print("without llama.cpp: it needs a .gguf file and the package xllamacpp", file=sys.stderr)
    sizes = ["--prefill", *map(str, flags.prefill), "--decode", *map(str, flags.decode)]
    sizes += ["--steps", str(flags.steps), "--rounds", str(flags.rounds)]
    sizes += ["--threads", str(flags.threads)]
    commands = {
        name: [
            *((python, __file__, str(flags.checkpoint)) if name == LLAMA else (
                sys.executable, __file__, str(converted))),
            *sizes,
        ]
        for name in names
    }  # fmt: skip
    memory = {
        name: json.loads(subprocess.run(
            [*command, "--peak", name], check=True, capture_output=True, text=True
        ).stdout.splitlines()[-1])
        for name, command in commands.items()
    }  # fmt: skip
    exact = [name for name in names if name != LLAMA and not memory[name]["weights"]]
    chosen = {name: memory[name]["token"] for name in exact}
    if len(set(chosen.values())) > 1:
        raise SystemExit(f"the contenders choose different tokens: {chosen}")
    workers = {name: Worker([*command, "--worker", name]) for name, command in commands.items()}
    _, seconds = measure(workers, flags.rounds)
    for worker in workers.values():
        worker.close()
    for tasks in seconds.values():
        for task in tasks:
            if task.startswith("decode"):
                tasks[task] = [value / flags.steps for value in tasks[task]]
    report(flags, memory, seconds)


def report(flags: argparse.Namespace, memory: dict[str, Any], seconds: dict[str, Any]) -> None:
    """Publishes the ratios to `transformers` first."""
    from rich.table import Table

    tasks = [f"prefill {n:,}" for n in flags.prefill] + [f"decode at {n:,}" for n in flags.decode]
    read = bytes_per_token(flags.checkpoint, flags.decode)
    columns = [*(f"{task}, ms" for task in tasks), "MB a token", "peak GB (rise)"]
    table = Table("", *columns)
    middle = {
        name: {task: statistics.median(times[task]) for task in tasks}
        for name, times in seconds.items()
    }
    for name in [name for name in middle if PEER in middle and name != PEER]:
        ratios = (f"{middle[PEER][task] / middle[name][task]:.2f} x" for task in tasks)
        share = f"{memory[PEER]['peak'] / memory[name]['peak']:.2f} x less"
        table.add_row(f"{name} against {PEER}", *ratios, "", share)
    table.add_section()
    for name, times in seconds.items():
        held = read.get(name, read["float32"])
        if memory[name]["weights"]:  # the states are those of float32
            fewer = memory[name]["weights"] - read["weights"][0]
            held = [value + fewer for value in read["float32"]]
        size = ", ".join(f"{value / 1e6:,.0f}" for value in held)
        peak, rise = memory[name]["peak"], memory[name]["peak"] - memory[name]["before"]
        cells = (spread(times[task]) for task in tasks)
        table.add_row(name, *cells, size, f"{peak / 1e9:.2f} ({rise / 1e9:.2f})")
    results = {"seconds": seconds, "memory": memory, "bytes": read}
    publish(table, results, flags.output)


if __name__ == "__main__":
    main()
