"""Both twins' training; a small corpus and model, and `recurrentgemma train` in this process."""

import json
import os
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from trainers import TRAINERS, Trainer

from backends import TWINS
from recurrentgemma.cli import main
from recurrentgemma.common.io.arrays import BFLOAT16
from recurrentgemma.common.io.checkpoint import load_tokenizer
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec, sample_param
from recurrentgemma.common.training.logs import read_log
from recurrentgemma_conversion.readers.native import save_folder

CONFIG = GriffinConfig(
    vocab_size=2048,
    width=16,
    mlp_expanded_width=32,
    num_heads=2,
    block_types=("recurrent", "attention"),  # pyright: ignore[reportArgumentType]
    embeddings_scale_by_sqrt_dim=True,
    attention_window_size=8,
    logits_soft_cap=5.0,
)
WORDS = "the of and to in that he shall unto for his a lord they be is him not them it with"


def _installed(twin: str) -> Trainer:
    if twin not in TRAINERS:
        pytest.skip(f"{twin} is not installed")
    return TRAINERS[twin]


@pytest.fixture(params=TWINS)
def trainer(request: pytest.FixtureRequest) -> Trainer:
    """Each twin's training in turn."""
    return _installed(request.param)


@pytest.fixture
def trainers() -> tuple[Trainer, Trainer]:
    """Both twins' training: JAX, PyTorch."""
    one, other = map(_installed, TWINS)
    return one, other


@pytest.fixture(params=["jax", "torch"])
def framework(request) -> str:
    pytest.importorskip({"jax": "flax.linen", "torch": "torch.nn"}[request.param])
    return request.param


@pytest.fixture
def both_frameworks() -> None:
    pytest.importorskip("flax.linen")
    pytest.importorskip("torch.nn")


def write_lines(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder with train.jsonl, valid.jsonl and config.json."""
    draw = random.Random(0)
    texts = [
        {"text": " ".join(draw.choices(WORDS.split(), k=draw.randint(3, 30)))} for _ in range(120)
    ]
    write_lines(tmp_path / "train.jsonl", texts[20:])
    write_lines(tmp_path / "valid.jsonl", texts[:20])
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    return tmp_path


@pytest.fixture
def base(tmp_path) -> Path:
    """A checkpoint in bfloat16, with random weights."""
    dtypes = {spec.path: BFLOAT16 for spec in layer_spec(CONFIG)}
    path = tmp_path / "base"
    save_folder(path, CONFIG, dtypes, lambda spec: sample_param(spec, 1), load_tokenizer())
    return path


class Outcome(NamedTuple):
    """The outcome of a run."""

    code: int
    out: str
    err: str


def arguments(corpus: Path, framework: str, **changes: Any) -> list[str]:
    """The command line of a small run; options change it, and None leaves one out."""
    options = {
        "train": corpus / "train.jsonl",
        "validation": corpus / "valid.jsonl",
        "config": corpus / "config.json",
        "out": corpus / "run",
        "framework": framework,
        "length": 16,
        "batch-size": 2,
        "steps": 6,
        "evaluate-every": 3,
        "checkpoint-every": 2,
        "log-every": 2,
        "sample-tokens": 0,
        "learning-rate": 0.01,
        "plot": False,
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    words = ["train"]
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            for item in value if isinstance(value, list) else [value]:
                words += [f"--{name}", os.fspath(item) if isinstance(item, Path) else str(item)]
    return words


@pytest.fixture
def train(corpus, capsys, monkeypatch):
    """Runs a small training and returns its outcome."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(framework: str = "torch", **changes: Any) -> Outcome:
        capsys.readouterr()
        return Outcome(main(arguments(corpus, framework, **changes)), *capsys.readouterr())

    return run


@pytest.fixture
def losses(corpus):
    """The steps and losses in a log."""

    def read(name: str = "train", out: str = "run") -> list[tuple[int, float]]:
        return [(e["step"], e["loss"]) for e in read_log(corpus / out / f"{name}_log.jsonl")]

    return read


@pytest.fixture
def command(corpus):
    """The command line of a small run."""

    def words(framework: str, **changes: Any) -> list[str]:
        return arguments(corpus, framework, **changes)

    return words
