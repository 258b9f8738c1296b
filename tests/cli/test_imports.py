"""What a command must not import: each import is waited for at each call."""

import json
import os
import subprocess
import sys

import pytest

FRAMEWORKS = {"jax", "jaxlib", "flax", "torch"}
CODE = """
import io, sys
from recurrentgemma.cli import main
out, sys.stdout = sys.stdout, io.StringIO()
code = main(sys.argv[1:])
out.write(__import__("json").dumps(sorted(sys.modules)))
sys.exit(code)
"""


SPINNERS = """
import importlib, json, sys
from recurrentgemma.cli import main
def working(message):
    raise SystemExit
for name in ("sample", "chat", "score"):
    importlib.import_module(f"recurrentgemma.cli.{name}").working = working
    try:
        main([name, *["-"] * (name != "chat")])
    except SystemExit:
        continue
    raise AssertionError(f"{name} shows no spinner")
print(json.dumps(sorted(sys.modules)))
"""
SLOW = FRAMEWORKS | {"numpy", "sentencepiece", "tokenizers", "jaxtyping"}


def imported(*args: str, code: str = CODE) -> set[str]:
    """The modules that a command imports, in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        input="",
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("args", [("--version",), ("sample", "--help"), ("--help",)])
def test_help_imports_nothing_that_is_slow(args):
    modules = imported(*args)
    assert not modules & SLOW
    commands = {name for name in modules if name.startswith("recurrentgemma.cli.")}
    if args != ("--help",):
        assert not commands & {f"recurrentgemma.cli.{name}" for name in ("train", "parity")}
    assert not any(name.startswith("recurrentgemma_conversion") for name in modules)


def test_the_spinner_comes_before_anything_slow():
    assert not imported(code=SPINNERS) & SLOW


@pytest.mark.parametrize(("framework", "other"), [("jax", "torch"), ("torch", "jax")])
def test_sampling_imports_no_more_than_it_needs(framework, other):
    pytest.importorskip({"jax": "flax.linen", "torch": "torch.nn"}[framework])
    modules = imported("sample", "x", "--framework", framework, "--max-new-tokens", "0")
    assert framework in modules
    assert other not in modules
    for name in (
        "optax",
        "tokenizers",
        "transformers",
        "orbax",
        "orbax.checkpoint",
        "matplotlib",
        "scipy",
        "gguf",
        "huggingface_hub",
        f"recurrentgemma.{framework}.training",
        "recurrentgemma.cli.train",
        "recurrentgemma.cli.chat",
        "recurrentgemma.parity",
        "torch._dynamo",
        "torch._inductor",
    ):
        assert name not in modules
