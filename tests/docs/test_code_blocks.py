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

from recurrentgemma.cli import main

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    names: dict = {"__name__": "__main__"}
    output = None
    for block in blocks(page):
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
