"""Memory and rate of converting a checkpoint between all formats, each in its own process.

    python benchmarks/conversion.py --folder /some/disk --preset RECURRENT_GEMMA_2B_V1

For each direction it measures the peak of anonymous memory (RssAnon, which leaves out mapped files)
above the level after the imports, and three rates: writing, verifying, and everything with every
byte flushed to the disk. Between safetensors formats, `cp` copies the source just before each
conversion, once plain and once flushed, in `--rounds` rounds. Two ratios compare: writing with
plain `cp`, and everything, verification included, with flushed `cp`. If flushed `cp` is much slower
than plain `cp`, the disk is the limit.

Every run starts with an idle disk, and with as much memory as the copy takes, just used and freed:
a virtual machine's host takes back memory that is free for some seconds, and `cp` is three times as
slow when it must ask for it again. The script reads /proc, so it runs on Linux.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import publish
from rich.table import Table

from recurrentgemma.common.io.arrays import BFLOAT16
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.state_dict import torch_name, torch_shape
from recurrentgemma_conversion import Format, Progress, convert
from recurrentgemma_conversion.convert import WRITERS
from recurrentgemma_conversion.readers.base import Contents
from recurrentgemma_conversion.readers.native import write_native

SAFETENSORS = {Format.RECURRENTGEMMA, Format.HUGGINGFACE}
INTERVAL = 0.005  # seconds between two looks at the memory


def make(folder: Path, config: GriffinConfig) -> None:
    """A checkpoint of random finite bfloat16 values: random bits, with small exponents."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    dtypes = {spec.path: BFLOAT16 for spec in layer_spec(config)}
    with write_native(folder, Contents(config, dtypes)) as write:
        for spec in layer_spec(config):
            bits = np.frombuffer(rng.bytes(2 * spec.size), np.uint16) & np.uint16(0xBFFF)
            values = bits.view(BFLOAT16).reshape(torch_shape(spec.path, spec.shape))
            write(torch_name(spec.path), values)


def rss_anon() -> int:
    """Bytes of anonymous memory in use."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


class Peak:
    """The peak of anonymous memory in the `with` block, above the level before it."""

    def __enter__(self) -> Peak:
        self.bytes, self._before, self._stop = 0, rss_anon(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.bytes = max(self.bytes, rss_anon() - self._before)

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()


def child(source: Path, destination: Path, to: str, tokenizer: Path) -> None:
    """Converts, and prints memory and times."""
    if Format.KAGGLE_TORCH in (to, source.name):
        import torch  # noqa: F401  # imports do not count
    times: dict[str, list[float]] = {}

    def progress(step: Progress) -> None:
        times.setdefault(step.phase, []).append(time.perf_counter())

    make_ready(sum(file.stat().st_size for file in source.rglob("*")))
    with Peak() as peak:
        summary = convert(source, destination, to, progress=progress, tokenizer=tokenizer)
    seconds = {phase: t[-1] - t[0] for phase, t in times.items()} | {"total": summary.seconds}
    print(json.dumps({"peak": peak.bytes, "bytes": summary.bytes} | seconds))


def make_ready(size: int) -> None:
    """Waits until the disk is idle, and makes the host provide memory."""
    os.sync()
    subprocess.run([sys.executable, "-c", f"b'1' * {size}"], check=True)


def copy(source: Path, destination: Path, *, flush: bool) -> float:
    """The bytes per second of `cp`."""
    size = sum(file.stat().st_size for file in source.iterdir())
    make_ready(size)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    if flush:
        subprocess.run(["sync", "-f", destination], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(destination)
    return size / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="folder with room for 6 copies")
    parser.add_argument("--preset", default="RECURRENT_GEMMA_2B_V1")
    parser.add_argument("--formats", nargs="+", default=list(WRITERS), choices=list(WRITERS))
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each comparison with cp")
    parser.add_argument("--output", type=Path, help="file for the results, without a suffix")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        source, destination, to, tokenizer = args.child
        child(Path(source), Path(destination), to, Path(tokenizer))
        return
    config = GriffinConfig.from_preset(args.preset)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        rows = run(Path(name), config, [Format(f) for f in args.formats], args.rounds)
    rates = ("write", "verify", "total", "cp", "cp flushed")
    columns = ("from", "to", "peak, GB", *(f"{rate}, MB/s" for rate in rates))
    table = Table(*columns, "write / cp", "total / cp flushed")
    for row in rows:
        cells = [row["source"], row["to"], f"{max(row['peak']) / 1e9:.2f}"]
        cells += [middle([r / 1e6 for r in row[rate]], 0) if rate in row else "" for rate in rates]
        if "cp" in row:
            cells += [ratios(row["write"], row["cp"]), ratios(row["total"], row["cp flushed"])]
        table.add_row(*cells)
    publish(table, {"rows": rows}, args.output)


def middle(values: list[float], digits: int) -> str:
    """Median and range."""
    text = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratios(rates: list[float], others: list[float]) -> str:
    """How rates compare with others, round by round."""
    return middle([rate / other for rate, other in zip(rates, others, strict=True)], 2)


def run(folder: Path, config: GriffinConfig, formats: list[Format], rounds: int) -> list[dict]:
    tokenizer = write_tokenizer(folder, config.vocab_size)
    make(folder / "recurrentgemma", config)
    shutil.copy(tokenizer, folder / "recurrentgemma/tokenizer.model")
    rows = []
    # Convert from ours first: this makes the sources for the others.
    order = sorted(formats, key=lambda f: f is not Format.RECURRENTGEMMA)
    for source in order:
        for to in order:
            kept = folder / to
            compared = {source, to} <= SAFETENSORS
            row: dict[str, Any] = {"source": source, "to": to}
            for _ in range(rounds if compared else 1):
                destination = folder / "out" if kept.exists() else kept
                if compared:
                    for name in ("cp", "cp flushed"):
                        rate = copy(folder / source, folder / "copy", flush=name == "cp flushed")
                        row.setdefault(name, []).append(rate)
                command = [sys.executable, __file__, "--child"]
                command += [str(folder / source), str(destination), to, str(tokenizer)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                measured = json.loads(done.stdout)
                row["bytes"] = measured["bytes"]
                row.setdefault("peak", []).append(measured["peak"])
                for phase in ("write", "verify", "total"):
                    row.setdefault(phase, []).append(row["bytes"] / measured[phase])
                if destination != kept:
                    shutil.rmtree(destination)
            rows.append(row)
            print(
                f"{source} to {to}: {statistics.median(row['write']) / 1e6:.0f} MB/s",
                file=sys.stderr,
            )
    return rows


def write_tokenizer(folder: Path, size: int) -> Path:
    """A sentencepiece model with this many pieces."""
    # Its classes are made at run time.
    spm: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    model = spm.ModelProto()
    for i in range(size):
        piece = model.pieces.add(piece=f"<{i}>", score=-i)
        if i < 4:
            kinds = spm.ModelProto.SentencePiece
            piece.type = kinds.UNKNOWN if i == 3 else kinds.CONTROL
            piece.piece = ("<pad>", "</s>", "<s>", "<unk>")[i]
    model.trainer_spec.pad_id, model.trainer_spec.eos_id = 0, 1
    model.trainer_spec.bos_id, model.trainer_spec.unk_id = 2, 3
    model.trainer_spec.vocab_size = size
    path = folder / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    return path


if __name__ == "__main__":
    main()
