"""A checkpoint is the same model in both twins, and in every format."""

import functools
from pathlib import Path

import pytest
from checkpoints import CONFIGS, write_checkpoint
from sweeps import sweep

from recurrentgemma.parity import Report, compare, load_model, make_batch
from recurrentgemma_conversion import Format
from recurrentgemma_conversion.convert import WRITERS

pytest.importorskip("jax.numpy", reason="jax is not installed")
pytest.importorskip("torch.nn", reason="torch is not installed")

CONFIG = CONFIGS["griffin"]


def compare_files(one: tuple[str, Path], other: tuple[str, Path]) -> Report:
    return compare(
        functools.partial(load_model, *one, "float64"),
        functools.partial(load_model, *other, "float64"),
        make_batch(CONFIG, 24),
        "float64",
        num_greedy=2,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("formats")
    for format_ in WRITERS:
        for dtype in ("float32", "bfloat16"):
            write_checkpoint(root / f"{format_}-{dtype}", format_, CONFIG, dtype)
    return root


DTYPES = ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("format_", "dtype"),
    sweep(
        [(format_, DTYPES[i % 2]) for i, format_ in enumerate(WRITERS)],
        [(format_, dtype) for format_ in WRITERS for dtype in DTYPES],
    ),
)
def test_in_both_twins(folder: Path, format_: Format, dtype: str) -> None:
    path = folder / f"{format_}-{dtype}"
    report = compare_files(("jax", path), ("torch", path))
    assert report.within, report.first_beyond


@pytest.mark.parametrize("format_", [f for f in WRITERS if f is not Format.RECURRENTGEMMA])
def test_against_ours(folder: Path, format_: Format) -> None:
    ours, theirs = folder / f"{Format.RECURRENTGEMMA}-float32", folder / f"{format_}-float32"
    report = compare_files(("torch", ours), ("torch", theirs))
    assert max(row.error.largest for row in report.rows) == 0


def test_rounded_weights_are_another_model(folder: Path) -> None:
    ours = (folder / f"{Format.RECURRENTGEMMA}-{dtype}" for dtype in ("float32", "bfloat16"))
    one, other = (("torch", path) for path in ours)
    report = compare_files(one, other)
    assert not report.within
    assert report.first_beyond is not None
    assert report.first_beyond.kind == "parameter"
