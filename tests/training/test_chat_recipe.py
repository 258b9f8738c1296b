"""The data of the bundled chat model: what it asks is read as training reads it, or is held out."""

import importlib
import json
from pathlib import Path

import pytest

from recurrentgemma.common.io.checkpoint import load_tokenizer
from recurrentgemma.common.training.data import read_examples

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of examples/chat_tiny."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "pretrain"))
    monkeypatch.syspath_prepend(str(EXAMPLES / "chat_tiny"))
    return importlib.import_module


@pytest.fixture
def data(script):
    """The data of a corpus that says only what the tables quote, and one paragraph a source."""
    corpus, tables = script("corpus"), script("tables")
    quotes = {
        "austen": ("austen", "novels", "{opening}"),
        "bible": ("bible", "verses", "{start} {rest}"),
    }
    documents = []
    for source, (file, table, quote) in quotes.items():
        rows = tables.read_file(EXAMPLES / "chat_tiny" / f"{file}.toml")[table].rows
        said = "\n\n".join(tables.filled(quote, row) for row in rows)
        documents.append(corpus.Document(source, source, f"{source}\n\n{said}\n\n{'So. ' * 40}"))
    return script("make_data").Data(corpus.Corpus(documents, []))


def test_conversations_are_what_training_reads(data, tmp_path) -> None:
    conversations = [data.conversation() for _ in range(300)]
    lines = "".join(json.dumps({"messages": turns}) + "\n" for turns in conversations)
    (tmp_path / "train.jsonl").write_text(lines)
    examples = read_examples(tmp_path / "train.jsonl", load_tokenizer())
    assert len(examples) == 300
    assert max(len(example.tokens) for example in examples) < 512
    assert sum(turns[0]["role"] == "system" for turns in conversations) > 30
    assert not any("{" in turn["content"] for turns in conversations for turn in turns)


def test_held_out_wordings_are_not_trained_on(data) -> None:
    asked = {turn["content"] for _ in range(3000) for turn in data.conversation()}
    tests = list(data.held_out())
    regular = [test for test in tests if "short" not in test["about"].lower()]
    assert len(regular) > 800
    assert not asked & {test["messages"][-1]["content"] for test in regular}
    assert all(test["key"] in test["answer"] for test in tests)


def test_a_fact_that_the_corpus_does_not_say_is_an_error(data, script) -> None:
    corpus, make_data = script("corpus"), script("make_data")
    with pytest.raises(corpus.CorpusError, match="the corpus does not say: The family of Dashwood"):
        make_data.Data(corpus.Corpus([], []))


def test_an_answer_counts_if_it_is_right_and_ends(script) -> None:
    measure = script("measure")
    tests = [{"about": "x", "key": "Emma", "answer": "Emma."}] * 3
    said = [measure.Answer(*pair) for pair in (("Emma.", True), ("Emma!", True), ("Emma.", False))]
    assert measure.shares(tests, said) == {"x": (3, 2, 1, 2), "All": (3, 2, 1, 2)}
