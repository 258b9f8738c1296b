"""The README: its links lead somewhere, and the Japanese edition says the same."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EDITIONS = [ROOT / "README.md", ROOT / "docs/README_JA.md"]
BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")


@pytest.mark.parametrize("page", EDITIONS, ids=lambda page: page.stem)
def test_links(page):
    links = [link for link in LINK.findall(page.read_text()) if not link.startswith("http")]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert links
    assert not missing


def test_editions_are_equal():
    """Headings of the same levels, the same blocks of code, tables of the same rows and figures."""
    english, japanese = (page.read_text() for page in EDITIONS)
    assert BLOCK.findall(english) == BLOCK.findall(japanese)
    outline = [
        re.findall(r"^(#+) ", BLOCK.sub("", text), re.MULTILINE) for text in (english, japanese)
    ]
    assert outline[0] == outline[1]
    tables = [re.findall(r"^\|.*\|$", text, re.MULTILINE) for text in (english, japanese)]
    assert len(tables[0]) == len(tables[1])
    for one, other in zip(*tables, strict=True):
        figures = [re.findall(r"\d+\.\d+ x|\d+\.\d+ / \d+\.\d+ s", row) for row in (one, other)]
        assert figures[0] == figures[1]
    assert "docs/README_JA.md" in english
    assert "../README.md" in japanese
