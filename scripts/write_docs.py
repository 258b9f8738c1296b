"""Writes the parts of the documentation that follow from the code; `make docs` runs it.

    python scripts/write_docs.py

Between `<!-- generated: NAME -->` and `<!-- end -->` a page holds the output of the function NAME.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recurrentgemma.cli import help as cli_help
from recurrentgemma.cli.app import NAME, program
from recurrentgemma.cli.inspect import described
from recurrentgemma.cli.tables import render
from recurrentgemma.common import sharding
from recurrentgemma.common.model.families import config_from_preset
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.presets import Preset, TemporalBlockType
from recurrentgemma.common.traffic import traffic
from recurrentgemma_conversion import Format
from recurrentgemma_conversion.names import layout
from recurrentgemma_conversion.names.table import Piece

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS = DOCS.parent / "benchmarks/results"
CONTENDERS = {
    "jax": "**JAX**",
    "torch": "**PyTorch**",
    "torch, step compiled": "**PyTorch**, step compiled",
    "jax remat": "**JAX**, checkpointing",
    "torch remat": "**PyTorch**, checkpointing",
    "transformers": "`transformers`",
    "published jax": "published, JAX",
    "published torch": "published, PyTorch",
    "published tutorial, associative": "published tutorial",
    "jax, q8": "**JAX**, `q8`",
    "torch, q8": "**PyTorch**, `q8`",
    "torch, q4": "**PyTorch**, `q4`",
    "llama.cpp": "llama.cpp, Q4_K_M",
    "bound": "the weights read once",
    "jax xla": "**JAX**, `xla`",
    "jax associative": "**JAX**, `associative`",
    "torch native": "**PyTorch**, `native`",
    "torch loop": "a loop in PyTorch",
    "C": "C, new output",
    "C, same output": "C",
}
_GENERATED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def names() -> Iterator[str]:
    """The table of names: one layer of each kind, its shapes in letters."""
    # No two letters share a size.
    config = GriffinConfig(
        vocab_size=1009, width=60, mlp_expanded_width=77, num_heads=5, lru_width=40,
        attention_window_size=8, logits_soft_cap=30.0, embeddings_scale_by_sqrt_dim=True,
        block_types=(TemporalBlockType.RECURRENT, TemporalBlockType.ATTENTION),
    )  # fmt: skip
    letters = {1009: "V", 60: "D", 77: "M", 40: "L", 5: "H", 8: "L/H", 12: "D/H"}

    def shape(sizes: tuple[int, ...]) -> str:
        return f"[{', '.join(letters.get(size, str(size)) for size in sizes)}]"

    def stored(piece: Piece) -> str:
        part = "" if piece.part is None else f" (half {piece.part})"
        turned = " ↔" if list(piece.order) != sorted(piece.order) else ""
        return f"`{_numbered(piece.name)}`{turned}{part}"

    torch, hf = (layout(config, f).pieces for f in (Format.KAGGLE_TORCH, Format.HUGGINGFACE))
    yield "| `kaggle-flax` | shape | `kaggle-torch`, `recurrentgemma` | `huggingface` |"
    yield "|---|---|---|---|"
    seen = set()
    for spec in layer_spec(config):
        path = _numbered(spec.path)
        if path not in seen:
            seen.add(path)
            ours, theirs = ("<br>".join(map(stored, names[spec.path])) for names in (torch, hf))
            yield f"| `{path}` | {shape(spec.shape)} | {ours} | {theirs} |"


def memory() -> Iterator[str]:
    """The sizes that `recurrentgemma inspect --preset NAME --memory` prints."""
    for preset in Preset:
        config = config_from_preset(preset)
        lines = list(render(described(config, {}, memory=True), every_block=False))
        start = next(i for i, line in enumerate(lines) if "size" in line and "float32" in line)
        yield f"## {preset.name}"
        yield ""
        yield '<div class="bars wide" markdown>'
        above = ""
        for line in (re.sub(r"\x1b\[\d+m", "", line) for line in lines[start:]):
            cells = re.split(r" {2,}", line.strip())
            yield f"| {' | '.join(cells)} |" if line else ""
            if line and not above:
                yield "|---" * len(cells) + "|"
            above = line
        yield ""
        yield "</div>"
        yield ""


def layouts() -> Iterator[str]:
    """How three models lie on three meshes, and what a step of training takes there."""
    meshes = ({"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 256})
    for name in ("RECURRENT_GEMMA_2B_V1", "RECURRENT_GEMMA_9B_V1", "GRIFFIN_PAPER_7B"):
        config = config_from_preset(name)
        splits = [sharding.layout(config, mesh) for mesh in meshes]
        yield from (f"### {name}", "", '<div class="bars wide" markdown>')
        yield f"| parameter | {' | '.join(map(sharding.mesh_text, meshes))} |"
        yield "|---" * 4 + "|"
        seen = set()
        for spec in layer_spec(config):
            path = _numbered(spec.path)
            if path not in seen:
                seen.add(path)
                cells = (" ".join(axis or "-" for axis in split[spec.path]) for split in splits)
                yield f"| `{path}` | {' | '.join(cells)} |"
        costs = []
        for mesh in meshes:
            rows = 8 * mesh["fsdp"]  # 8 rows of 2,048 tokens for each part of the batch
            costs.append(traffic(config, mesh, rows, 2048))
        memory = (f"{cost.memory / 1e9:.1f} GB" for cost in costs)
        yield f"| **held: AdamW beside bfloat16** | {' | '.join(memory)} |"
        sent = (f"{cost.sent / 1e9:.1f} GB" for cost in costs)
        yield f"| **sent a step** | {' | '.join(sent)} |"
        operations = (f"{cost.operations / 1e12:,.0f} T" for cost in costs)
        yield f"| **operations a step** | {' | '.join(operations)} |"
        yield from ("", "</div>", "")


def roofline() -> Iterator[str]:
    """What bounds a step of training on the usual large machines: computing or sending."""
    machines = {  # bfloat16 operations a second and bytes a second that a device sends, at most
        "TPU v5e-256": (
            197e12,
            100e9,
            256,
            ("fsdp=256", "fsdp=128,tensor=2", "fsdp=16,sequence=16"),
        ),
        "8 x H100": (989e12, 450e9, 64, ("data=8", "fsdp=8", "fsdp=4,tensor=2", "sequence=8")),
    }
    for machine, (operations, sent, rows, meshes) in machines.items():
        yield f"{machine}, {rows} rows of 2,048 tokens:"
        yield ""
        yield '<div class="bars wide" markdown>'
        yield "| model, mesh | held, GB | computing, ms | sending, ms | bound by |"
        yield "|---|---|---|---|---|"
        for name in ("RECURRENT_GEMMA_2B_V1", "RECURRENT_GEMMA_9B_V1"):
            config = config_from_preset(name)
            for text in meshes:
                cost = traffic(config, sharding.parse_mesh(text, 256), rows, 2048)
                times = cost.operations / operations, cost.sent / sent
                computing, sending = (f"{seconds * 1e3:,.0f}" for seconds in times)
                bound = ("computing", "sending")[times[1] > times[0]]
                held = f"{cost.memory / 1e9:.1f}"
                yield f"| `{name}`, `{text}` | {held} | {computing} | {sending} | {bound} |"
        yield from ("", "</div>", "")


def model_speed() -> Iterator[str]:
    """A table with bars for each task of `benchmarks/model.py`."""
    results = _results("model-cpu")
    seconds = results["seconds"]
    tasks = {
        "forward": "Forward, 1,024 tokens",
        "prefill": "Prefill, 1,024 tokens",
        "long prefill": "Prefill, 8,192 tokens",
        "decode": "Decoding, a token",
        "train": "A training step",
    }
    yield from _made(results, "model-cpu")
    yield '<div class="bars" markdown>'
    for task, title in tasks.items():
        rows = [(name, _scaled(of[task], 1e3)) for name, of in seconds.items()]
        if task == "decode":
            rows.append(("bound", [results["bound"] * 1e3]))
        yield from _bars([title, "ms"], rows, least_first=True)
    rows = [(name, [results["peak_bytes"][name] / 1e9]) for name in seconds]
    yield from _bars(["Peak memory", "GB"], rows, least_first=True)
    rows = [(name, results["first"][name]["train"]) for name in seconds]
    yield from _bars(["The first training step", "s"], rows, least_first=True)
    yield "</div>"


def gemma() -> Iterator[str]:
    """Real weights: what a prompt and a token take, and the memory of the longest prompt."""
    tasks = {
        "gemma3-270m-short-cpu": ("prefill 512", "decode at 1,000"),
        "gemma3-270m-cpu": ("prefill 8,192", "decode at 8,000"),
    }
    yield '<div class="bars" markdown>'
    for name, measured in tasks.items():
        results = _results(name)
        seconds = results["seconds"]
        yield ""
        yield from _made(results, name)
        for task in measured:
            rows = [(contender, _scaled(of[task], 1e3)) for contender, of in seconds.items()]
            title = f"{task.capitalize()} tokens{', a token' if 'decode' in task else ''}"
            yield from _bars([title, "ms"], rows, least_first=True)
    memory = _results("gemma3-270m-cpu")["memory"]
    rows = [(contender, [of["peak"] / 1e9]) for contender, of in memory.items()]
    yield from _bars(["Peak memory of 8,192 tokens", "GB"], rows, least_first=True)
    yield "</div>"


def quantized() -> Iterator[str]:
    """Each form of the 2B model: its bytes, and a step of one row and of 32."""
    results = _results("quantized-2b-cpu")
    rows = [
        (
            name,
            [results["bytes"][name] / 1e9],
            [max(of["peak_bytes"]) / 1e9],
            _scaled(of["1"], 1e3),
            _scaled(of["32"], 1e3),
        )
        for name, of in results["seconds"].items()
    ]
    yield from _made(results, "quantized-2b-cpu")
    yield '<div class="bars wide" markdown>'
    yield from _bars(["2B", "GB", "peak, GB", "1 row, ms", "32 rows, ms"], rows)
    yield "</div>"


def quantized_peers() -> Iterator[str]:
    """Each library's forms: bytes, a token's time, and the error beside its own float32."""
    results = _results("quantized-peers-cpu")
    yield from _made(results, "quantized-peers-cpu")
    yield '<div class="bars wide" markdown>'
    for title, is_stack in (("185 million parameters", False), ("matrices alone", True)):
        rows = []
        for name, of in results["seconds"].items():
            if name.startswith("stack-") == is_stack:
                figures = [of["bytes"][0] / 1e9], _scaled(of["step"], 1e3), of["error"]
                rows.append((name.removeprefix("stack-"), *figures))
        yield from _bars([title, "GB", "a token, ms", "error"], rows)
    yield "</div>"


def fine_tuning() -> Iterator[str]:
    """The time of a training step, and its memory with a large vocabulary."""
    results, memory = _results("training-time-cpu"), _results("training-memory-cpu")
    yield from _made(results, "training-time-cpu")
    yield '<div class="bars" markdown>'
    rows = [(name, _scaled(of["step"], 1e3)) for name, of in results["seconds"].items()]
    yield from _bars(["A step", "ms"], rows, least_first=True)
    rows = [(name, [of["peak"] / 1e9]) for name, of in memory["bytes"].items()]
    yield from _bars(["Peak memory, large vocabulary", "GB"], rows, least_first=True)
    yield "</div>"


def data_parallel() -> Iterator[str]:
    """A step in one process and in two, each with a core."""
    results = _results("data-parallel-cpu")
    yield from _made(results, "data-parallel-cpu")
    yield '<div class="bars" markdown>'
    rows = [(name, _scaled(of["step"], 1e3)) for name, of in results["seconds"].items()]
    yield from _bars(["A step", "ms"], rows)
    yield "</div>"


def long_stream() -> Iterator[str]:
    """What a token costs after so many."""
    results = _results("long-stream-cpu")
    yield from _made(results, "long-stream-cpu")
    yield '<div class="bars" markdown>'
    for name in ("jax", "torch"):
        rows = [
            (
                f"{row['tokens']:,}",
                [row["memory_bytes"] / 1e6],
                [row["us_a_token_read"]],
                [row["ms_a_token_generated"]],
            )
            for row in results[name]
        ]
        yield from _bars([f"{CONTENDERS[name]}: tokens", "memory, MB", "read, µs", "new, ms"], rows)
    yield "</div>"


def conversion() -> Iterator[str]:
    """The rates from every format to every other."""
    results = _results("conversion-cpu")
    yield from _made(results, "conversion-cpu")
    yield '<div class="bars" markdown>'
    for source in dict.fromkeys(row["source"] for row in results["rows"]):
        rows = [
            (
                f"to {row['to']}",
                *(_scaled(row[rate], 1e-6) for rate in ("write", "total")),
                _scaled(row["peak"], 1e-9),
            )
            for row in results["rows"]
            if row["source"] == source
        ]
        yield from _bars([source, "write, MB/s", "and verify, MB/s", "peak, GB"], rows)
    yield "</div>"


def conversion_beside_cp() -> Iterator[str]:
    """The rates between safetensors formats, beside `cp`."""
    results = _results("conversion-safetensors-cpu")
    rates = ("write", "cp", "total", "cp flushed")
    rows = [
        (f"{row['source']} to {row['to']}", *(_scaled(row[rate], 1e-6) for rate in rates))
        for row in results["rows"]
    ]
    yield from _made(results, "conversion-safetensors-cpu")
    yield '<div class="bars wide" markdown>'
    yield from _bars(["MB/s", "write", "`cp`", "and verify", "`cp`, flushed"], rows)
    yield "</div>"


def scans() -> Iterator[str]:
    """A table for each pass of the recurrence, a column for each shape."""
    results = _results("scan-cpu")
    shapes = results["seconds"]
    yield from _made(results, "scan-cpu")
    yield '<div class="bars wide" markdown>'
    for title in ("scan forward", "scan backward", "fused forward", "fused backward"):
        keys = [key for key in next(iter(shapes.values())) if key.startswith(f"{title}|")]
        rows = [
            (key.split("|")[1], *(_scaled(of[key], 1e3) for of in shapes.values())) for key in keys
        ]
        header = [f"{title}, ms", *(shape.replace("x", " x ") for shape in shapes)]
        yield from _bars(header, rows, least_first=True)
    yield "</div>"


def serving() -> Iterator[str]:
    """Tokens a second of servers, all clients together, and the time until the first token."""
    for path in sorted(RESULTS.glob("serve-*.json")):
        results = json.loads(path.read_text())
        best = {(row["server"], row["clients"]): row for row in results["figures"]}
        stream = max(best["stream", 1]["rates"])
        clients = sorted({number for name, number in best if name == "recurrentgemma"})
        yield from (f"**{results['label']}**", "")
        yield from _made(results, path.stem)
        yield f"| clients | {' | '.join(map(str, clients))} |"
        yield "|---" * (1 + len(clients)) + "|"
        for server in dict.fromkeys(name for name, _ in best if name != "stream"):
            cells = [_served(best.get((server, number)), stream) for number in clients]
            yield f"| {server} | {' | '.join(cells)} |"
        yield from (f"| `stream` | {stream:,.0f} |{' |' * (len(clients) - 1)}", "")


def _served(row: Mapping[str, Any] | None, stream: float) -> str:
    if row is None:
        return ""
    rate = max(row["rates"])
    first = f", first after {1000 * min(row['first_s']):.0f} ms" if row["first_s"] else ""
    return f"{rate:,.0f} ({rate / stream:.2f}){first}"


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _scaled(values: Sequence[float], factor: float) -> list[float]:
    return [value * factor for value in values]


def _made(results: Mapping[str, Any], name: str) -> Iterator[str]:
    """Where the figures come from."""
    versions = ", ".join(
        f"{package} {results['versions'][package]}" for package in ("jax", "torch", "transformers")
    )
    yield f"{results['cpu']}; Python {results['python']}, {versions}"
    yield f"([every run](../benchmarks/results/{name}.json)):"
    yield ""


def _bars(
    header: Sequence[str], rows: Sequence[Sequence[Any]], least_first: bool = False
) -> Iterator[str]:
    """A table of medians; a bar over each is its share of its column's largest."""
    medians = [[statistics.median(values) for values in row[1:]] for row in rows]
    largest = [max(column) for column in zip(*medians, strict=True)]
    yield ""
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    order = range(len(rows))
    for i in sorted(order, key=lambda i: medians[i][0]) if least_first else order:
        texts = [CONTENDERS.get(rows[i][0], str(rows[i][0]))]
        for values, middle, most in zip(rows[i][1:], medians[i], largest, strict=True):
            ends = f" ({_short(min(values))} to {_short(max(values))})"
            text = _short(middle) + (ends if len(header) == 2 and len(values) > 1 else "")
            texts.append(f'<i style="--share: {middle / most:.0%}"></i>{text}')
        yield f"| {' | '.join(texts)} |"


def _short(value: float) -> str:
    """Three digits, without exponents."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def commands() -> Iterator[str]:
    """What `recurrentgemma --help` and each command's `--help` print."""
    pages = {NAME: program()} | {f"{NAME} {name}": c for name, c in program().commands.items()}
    for path, command in pages.items():
        yield ""
        yield f"## {path}"
        yield ""
        yield from cli_help.as_markdown(cli_help.described(command, path))


def _numbered(name: str) -> str:
    return re.sub(r"(blocks|layers)\.\d+", r"\1.N", name)


def written(text: str) -> str:
    """A page with its generated parts up to date."""
    return _GENERATED.sub(
        lambda match: match[1] + "\n".join(globals()[match[2]]()) + "\n" + match[3], text
    )


def main() -> int:
    """Rewrites the pages that have generated parts."""
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        new = written(text)
        if new != text:
            page.write_text(new)
            print(f"wrote {page.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
