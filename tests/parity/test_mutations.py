"""The faults of `make mutation` still apply, and its table has them all."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_faults():
    spec = importlib.util.spec_from_file_location("faults", ROOT / "scripts" / "faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FAULTS


FAULTS = load_faults()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_applies_in_one_place(fault) -> None:
    text = (ROOT / "recurrentgemma" / fault.file).read_text()
    assert text.count(fault.old) == 1
    compile(text.replace(fault.old, fault.new), fault.file, "exec")


def test_there_are_forty_and_the_table_has_them() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40
    table = (ROOT / "tests" / "parity" / "mutations.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()]
    assert [row for row in rows if row in {f.name for f in FAULTS}] == [f.name for f in FAULTS]
    assert f"{len(FAULTS)} of {len(FAULTS)} are seen by both." in table
