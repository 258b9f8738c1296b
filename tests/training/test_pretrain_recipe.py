"""The parts of the bundled model's recipe that its figures depend on."""

import importlib
import json
import math
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch.nn", reason="torch is not installed")

import torch

from recurrentgemma.cli import main
from recurrentgemma.common.io.arrays import BFLOAT16
from recurrentgemma.common.io.checkpoint import BUNDLED, load_tokenizer
from recurrentgemma_conversion.readers.native import NativeReader

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pretrain"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of examples/pretrain."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module


def test_bits_per_byte_of_a_uniform_model(script) -> None:
    """A model that knows nothing needs log2(V) bits a token, including each text's end."""
    evaluation, corpus = script("evaluation"), script("corpus")
    tokenizer = load_tokenizer()

    class Uniform(torch.nn.Module):
        def forward(self, tokens, segment_pos, cache=None):
            return torch.zeros(*tokens.shape, tokenizer.size), (cache or 0) + 1

    texts = {"bible": ["In the beginning\n", "And " * 600], "austen": ["Emma Woodhouse, handsome"]}
    documents = [corpus.Document(s, s, text) for s, group in texts.items() for text in group]
    rates = evaluation.bits_per_byte(Uniform(), tokenizer.vocab, documents, torch.device("cpu"))
    for source, group in (texts | {"overall": [*texts["bible"], *texts["austen"]]}).items():
        # As many as with BOS: that is not predicted, but EOS is.
        tokens = sum(len(tokenizer.encode(text)) for text in group)
        size = sum(len(text.encode()) for text in group)
        assert rates[source] == pytest.approx(math.log2(tokenizer.size) * tokens / size)


def test_the_command_reads_what_is_prepared(script, tmp_path, monkeypatch, capsys) -> None:
    """Chapters become lines; the options are the command's; a finished run becomes a model."""
    corpus, prepare = script("corpus"), script("prepare")
    texts = (
        "In the beginning God created the heavens and the earth. " * 9,
        "Emma Woodhouse. " * 20,
    )
    documents = [corpus.Document(s, s, t) for s, t in zip(("bible", "austen"), texts, strict=True)]
    pretrain = tmp_path / "runs" / "pretrain"
    pretrain.mkdir(parents=True)
    for part in ("train", "valid"):
        (pretrain / f"{part}.jsonl").write_bytes(prepare.to_jsonl(documents))
    shutil.copy(BUNDLED / "tokenizer.model", pretrain)
    shutil.copytree(EXAMPLE, tmp_path / "examples" / "pretrain")
    monkeypatch.chdir(tmp_path)
    config = json.loads((EXAMPLE / "config.json").read_text())
    assert config == json.loads((BUNDLED / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"width": 32, "lru_width": 32}))
    options = "--options examples/pretrain/options.toml --config config.json --batch-size 1"
    small = "--length 32 --warmup-steps 1 --sample-tokens 2 --epochs 1 --no-plot --framework torch"
    assert main(f"train {options} {small} --out runs/pretrain/run".split()) == 0
    finish, evaluation = script("finish"), script("evaluation")
    monkeypatch.setattr(evaluation, "PROMPTS", evaluation.PROMPTS[:1])
    monkeypatch.setattr(finish, "load_corpus", lambda *_: corpus.Corpus(documents, documents))
    monkeypatch.setattr(finish, "TARGET", 0.5)
    monkeypatch.setattr("sys.argv", ["finish.py", "runs/pretrain/run", "--out", "out"])
    assert finish.main() == 1  # for after a few steps it is worse than that
    assert NativeReader(tmp_path / "out").config.width == 32
    assert set(NativeReader(tmp_path / "out").dtypes.values()) == {BFLOAT16}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1.0 passes over the training text" in card
    assert "{" not in card
    capsys.readouterr()


def test_text_is_cleaned(script) -> None:
    corpus = script("corpus")
    assert corpus.clean_verse("In the{a note} beginning , God [created] -- all") == (
        "In the beginning, God created--all"
    )
    assert corpus.join_lines(["It is a truth", "universally--", "acknowledged,", "   My dear"]) == (
        "It is a truth universally--acknowledged,\nMy dear"
    )
