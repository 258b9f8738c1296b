"""The faults of `make mutation` still apply, and its table is of these faults and sources."""

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> Any:
    """A module of scripts/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        return importlib.import_module(name)


mutation = load("mutation")
FAULTS = mutation.FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_applies_in_one_place(fault) -> None:
    text = (ROOT / fault.path).read_text()
    assert text.count(fault.old) == 1
    compile(text.replace(fault.old, fault.new), fault.file, "exec")


def test_there_are_sixty_and_the_table_has_them() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 60
    table = mutation.TABLE.read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()]
    assert [row for row in rows if row in {f.name for f in FAULTS}] == [f.name for f in FAULTS]
    assert f"{len(FAULTS)} of {len(FAULTS)} are seen by both." in table


def test_the_table_is_of_these_sources() -> None:
    """`make mutation` writes it anew after a change to the twins, the spec or the faults."""
    assert f"\nSources: {mutation.sources_hash()}\n" in mutation.TABLE.read_text()


def test_words_do_not_make_the_table_stale() -> None:
    code = 'x = 1\n\n\ndef f():\n    return "text"'
    said = f'"""Words."""\n\n# More.\n{code}'.replace(
        "f():", 'f():\n    """And\n    more.\n    """'
    )
    assert mutation.code_of(said) == mutation.code_of(code) != mutation.code_of(code + " + x")
