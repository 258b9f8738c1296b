"""Which part of the package may import what, each checked in a fresh interpreter."""

import subprocess
import sys

import pytest

FRAMEWORKS = {"jax": ("jax", "jaxlib", "flax", "orbax"), "torch": ("torch",)}
COMMON = [
    "recurrentgemma",
    "recurrentgemma.common.io.checkpoint",
    "recurrentgemma.common.model.config",
    "recurrentgemma.common.model.layer_spec",
    "recurrentgemma.common.model.reference",
    "recurrentgemma.common.generation.sampler",
    "recurrentgemma.common.model.state",
    "recurrentgemma.common.tokenizer",
    "recurrentgemma.common.twin",
    "recurrentgemma.cli",
    "recurrentgemma.serve.server",
    "recurrentgemma_conversion",
]


def import_without(modules: list[str], absent: tuple[str, ...]) -> subprocess.CompletedProcess:
    """Imports modules where importing any of `absent` raises ImportError."""
    code = f"import sys\nfor name in {absent!r}: sys.modules[name] = None\n"
    code += "\n".join(f"import {module}" for module in modules)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_common_imports_no_framework() -> None:
    done = import_without(COMMON, FRAMEWORKS["jax"] + FRAMEWORKS["torch"])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("twin", "other"), [("jax", "torch"), ("torch", "jax")])
def test_a_twin_imports_without_the_other(twin: str, other: str) -> None:
    # A submodule: under pytest tests/jax or tests/torch would do for the package itself.
    submodule = {"jax": "jax.numpy", "torch": "torch.nn"}[twin]
    pytest.importorskip(submodule, reason=f"{twin} is not installed")
    # Newer versions of JAX are to come without Pallas' way through Triton.
    absent = (*FRAMEWORKS[other], "jax.experimental.pallas.triton")
    done = import_without([f"recurrentgemma.{twin}"], absent)
    assert done.returncode == 0, done.stderr


def test_a_forbidden_import_would_be_seen() -> None:
    assert import_without(["json"], ("json",)).returncode == 1
