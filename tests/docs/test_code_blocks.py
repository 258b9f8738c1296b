"""Every code block of the README and of the documentation runs, page by page, in order."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
from cases import make_config
from checkpoints import write_checkpoint
from sweeps import sweep

from recurrentgemma.cli import main
from recurrentgemma.common.io import checkpoint
from recurrentgemma_conversion import Format

pytest.importorskip("jax.numpy")
pytest.importorskip("torch.nn")

ROOT = Path(__file__).resolve().parents[2]
# The Japanese README has the blocks of the English one, to which another test holds it.
JAPANESE = ROOT / "docs/README_JA.md"
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {JAPANESE})]
FENCE = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>[^\n]+) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
REASONS = {
    "installs",
    "needs a network",
    "needs a server",
    "needs several devices",
    "sets everything up",
    "takes minutes",
}
SHOWN_ONLY = {"text", "json", "toml"}


class Block(NamedTuple):
    line: int
    language: str
    code: str
    reason: str | None
    follows: bool  # the block before, with nothing in between


def blocks(page: Path) -> list[Block]:
    text, end, found = page.read_text(), 0, []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        code = textwrap.dedent(match["code"])
        follows = end > 0 and not text[end : match.start()].strip()
        found.append(Block(line, match["language"], code, match["reason"], follows))
        end = match.end()
    return found


def parts(code: str) -> list[str]:
    """A block cut into commands of the program alone and the rest, which needs a shell."""
    found: list[str] = []
    for line in code.replace("\\\n", "").splitlines():
        if is_command(line) or not found or is_command(found[-1]):
            found.append(line)
        else:
            found[-1] += f"\n{line}"
    return found


def is_command(line: str) -> bool:
    return line.startswith("recurrentgemma ") and not set(line) & set("|&;<>()$`*?#\n")


def run(part: str, place: str) -> str:
    """What a part puts out: a command's in this process, to which the frameworks are known."""
    if is_command(part):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(shlex.split(part)[1:])
        assert code == 0, f"{place}: {err.getvalue()}"
        return out.getvalue()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", part],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{place}: {done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A model of two blocks, which compiles in less time than the bundled one of this name."""
    folder = tmp_path_factory.mktemp("small") / checkpoint.BUNDLED.name
    config = make_config("RA", vocab_size=2048, width=32, attention_window_size=64)
    return write_checkpoint(folder, Format.RECURRENTGEMMA, config)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page, tmp_path, monkeypatch, small):
    """The bundled model runs what a transcript follows, and a smaller one the rest of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    names: dict = {"__name__": "__main__"}
    output, found = None, blocks(page)
    transcripts = [block.line for block in found if block.language == "text" and block.follows]
    for block in found:
        if block.line > max(transcripts, default=0):
            monkeypatch.setattr(checkpoint, "BUNDLED", sweep(small, checkpoint.BUNDLED))
        if block.language == "text" and block.follows and output is not None:  # a transcript
            assert output.strip() == block.code.strip()
        if block.reason is not None or block.language in SHOWN_ONLY:
            continue
        output = None
        if block.language == "python":
            code = compile("\n" * block.line + block.code, str(page), "exec")
            exec(code, names)
        else:
            output = "".join(run(part, f"{page.name}:{block.line}") for part in parts(block.code))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_what_it_is(page):
    """Nothing escapes by an unknown language or a reason of its own."""
    for block in blocks(page):
        assert block.language in {"python", "sh", *SHOWN_ONLY}, f"{page.name}:{block.line}"
        assert block.reason in {None, *REASONS}, f"{page.name}:{block.line}"
    assert page.read_text().count("```") == 2 * len(blocks(page))
