"""The parts of the bundled model's recipe on which its figures rest."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch.nn", reason="torch is not installed")

import torch

from recurrentgemma.common.checkpoint import load_tokenizer

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of scripts/."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def test_bits_per_byte_of_a_uniform_model(script) -> None:
    """A model that knows nothing needs log2(V) bits a token, the end of each text included."""
    evaluation, corpus = script("tiny_evaluation"), script("tiny_corpus")
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


def test_rows_of_a_lane_follow_each_other(script) -> None:
    trainer = script("tiny_trainer")
    recipe = trainer.Recipe(batch_size=3, length=5)
    encoded = [np.arange(100 * i, 100 * i + n) for i, n in enumerate((17, 4, 29, 11, 23))]
    lanes = trainer.Lanes(encoded, recipe)
    first, second, *_ = rows = [row for row, _ in zip(lanes.rows(0), range(6), strict=False)]
    assert [fresh for *_, fresh in rows] == [True, False, False, False, False, True]
    np.testing.assert_array_equal(first[0][:, -1], second[0][:, 0])
    for tokens, positions, _ in rows:
        same_document = (tokens[:, 1:] // 100) == (tokens[:, :-1] // 100)
        assert ((positions[:, 1:] == positions[:, :-1] + 1) == same_document).all()
        assert (positions[:, 1:][~same_document] == 0).all()
    assert (first[1][:, 0] == 0).all()
    resumed = next(iter(lanes.rows(1)))
    for one, other in zip(resumed[:2], second[:2], strict=True):
        np.testing.assert_array_equal(one, other)


def test_orthogonalize_evens_singular_values(script) -> None:
    stack = torch.randn(2, 12, 20, generator=torch.Generator().manual_seed(0))
    for matrices in (stack, stack.mT):
        out = script("tiny_optimizer").orthogonalize(matrices, 5)
        values = torch.linalg.svdvals(out)
        assert values.min() > 0.5
        assert values.max() < 1.5
        # The singular vectors stay: U^T out V is diagonal.
        u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
        inner = u.mT @ out @ vt.mT
        off_diagonal = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
        assert off_diagonal.abs().max() < 1e-4


def test_text_is_cleaned(script) -> None:
    corpus = script("tiny_corpus")
    assert corpus.clean_verse("In the{a note} beginning , God [created] -- all") == (
        "In the beginning, God created--all"
    )
    assert corpus.join_lines(["It is a truth", "universally--", "acknowledged,", "   My dear"]) == (
        "It is a truth universally--acknowledged,\nMy dear"
    )
