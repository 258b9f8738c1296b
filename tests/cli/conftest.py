"""Checkpoints to run the command line on, and the command line in this process."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from recurrentgemma.cli import main
from recurrentgemma.common.io.checkpoint import BUNDLED
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import sample_params
from recurrentgemma.common.tokenizer import Tokenizer, apply_it_formatter
from recurrentgemma.common.vocabulary import SENTENCEPIECE
from recurrentgemma_conversion.readers.native import save_folder

CONFIG = GriffinConfig(
    vocab_size=2048,
    width=32,
    mlp_expanded_width=48,
    num_heads=2,
    block_types=("recurrent", "recurrent", "attention"),  # pyright: ignore[reportArgumentType]
    embeddings_scale_by_sqrt_dim=True,
    attention_window_size=16,
    logits_soft_cap=0.0,
)


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    """Help and colours as in a plain terminal of 80 columns."""
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(BUNDLED / SENTENCEPIECE)


def write(path: Path, params: dict[str, np.ndarray], tokenizer: Tokenizer) -> Path:
    dtypes = {path: value.dtype for path, value in params.items()}
    save_folder(path, CONFIG, dtypes, lambda spec: params[spec.path], tokenizer)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer) -> Path:
    """Random weights, large enough for text that does not repeat one token."""
    rng = np.random.default_rng(1)
    params = {
        spec.path: value + 0.3 * rng.standard_normal(spec.shape, np.float32)
        for spec, value in sample_params(CONFIG, 0)
    }
    return write(tmp_path_factory.mktemp("checkpoints") / "random", params, tokenizer)


@pytest.fixture(scope="session")
def stopping(tmp_path_factory, tokenizer) -> Path:
    """After the prompt "a" comes EOS at once, after a chat's prompt the end of the turn."""
    params = {spec.path: np.zeros_like(value) for spec, value in sample_params(CONFIG, 0)}
    embedding = np.random.default_rng(0).standard_normal((2048, 32)).astype(np.float32)
    embedding[tokenizer.eos_id] = 9 * embedding[tokenizer.encode("a")[-1]]
    last = tokenizer.encode(apply_it_formatter("a"))[-1]
    embedding[tokenizer.end_of_turn_id] = 9 * embedding[last]
    params["embedder.input_embedding"] = embedding
    return write(tmp_path_factory.mktemp("checkpoints") / "stopping", params, tokenizer)


@pytest.fixture
def bundled() -> Path:
    return BUNDLED


@pytest.fixture(params=["jax", "torch"])
def framework(request) -> str:
    # Submodules: tests/jax and tests/torch would do for the packages themselves.
    pytest.importorskip({"jax": "flax.linen", "torch": "torch.nn"}[request.param])
    return request.param


@pytest.fixture
def both_frameworks() -> None:
    pytest.importorskip("flax.linen")
    pytest.importorskip("torch.nn")


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        assert self.err == ""
        return json.loads(self.out)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs `recurrentgemma` with arguments and bytes on stdin."""

    def run(*args: str | os.PathLike[str], stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code = main([os.fspath(arg) for arg in args])
        return Outcome(code, *capsys.readouterr())

    return run
