"""Writes the parts of the documentation that follow from the code; `make docs` runs it.

    python scripts/write_docs.py

Between `<!-- generated: NAME -->` and `<!-- end -->` a page holds the output of the function NAME.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from recurrentgemma.cli import help as cli_help
from recurrentgemma.cli.app import NAME, program
from recurrentgemma.cli.inspect import described
from recurrentgemma.cli.tables import render
from recurrentgemma.common.model.families import config_from_preset
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.presets import Preset, TemporalBlockType
from recurrentgemma_conversion import Format
from recurrentgemma_conversion.names import layout
from recurrentgemma_conversion.names.table import Piece

DOCS = Path(__file__).resolve().parent.parent / "docs"
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
        yield "```text"
        yield from (re.sub(r"\x1b\[\d+m", "", line) for line in lines[start:])
        yield "```"
        yield ""


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
    functions = {"names": names, "memory": memory, "commands": commands}
    return _GENERATED.sub(
        lambda match: match[1] + "\n".join(functions[match[2]]()) + "\n" + match[3], text
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
