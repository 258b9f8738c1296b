"""Samplers on any object with the six methods of a sentencepiece processor that are called."""

import copy
import dataclasses
import itertools
import pickle

import pytest
from samplers import CONFIG, lists, make_sampler
from sweeps import sweep

from recurrentgemma.common.tokenizer import Tokenizer

WORDS = ["<pad>", "<s>", "</s>", "one", "two", "three", "go", "!"]


class WordVocabulary:
    """Words between spaces."""

    def pad_id(self) -> int:
        return 0

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return 2

    def GetPieceSize(self) -> int:
        return len(WORDS)

    def EncodeAsIds(self, text: str) -> list[int]:
        return [WORDS.index(word) for word in text.split(" ")]

    def DecodeIds(self, ids: list[int]) -> str:
        return " ".join(WORDS[token] for token in ids)


@pytest.mark.parametrize(
    ("echo", "return_logits"),
    sweep([(True, True), (False, False)], list(itertools.product([True, False], [True, False]))),
)
def test_a_sampler_needs_six_methods_alone(twin: str, echo: bool, return_logits: bool) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=len(WORDS))
    sampler = make_sampler(twin, config=config, vocab=WordVocabulary())
    out = sampler(
        ["one two", "three go !"],
        total_generation_steps=6,
        echo=echo,
        return_logits=return_logits,
        end_sampling_at_eos_token=False,
    )
    lengths = [6 + 3 * echo, 6 + 4 * echo]
    assert [len(row) for row in out.tokens] == lengths
    shapes = [(length, len(WORDS)) for length in lengths] if return_logits else []
    assert [logits.shape for logits in out.logits] == shapes
    new = [tokens[-6:] for tokens in lists(out.tokens)]
    for text, prompt, tokens in zip(out.text, ["one two", "three go !"], new, strict=True):
        spoken = " ".join(WORDS[token] for token in tokens if token > 2)
        assert text == (prompt + spoken if echo else spoken)
    again = pickle.loads(pickle.dumps(copy.deepcopy(sampler)))
    pieces = [text for _, text in again.stream("one two", 6, end_sampling_at_eos_token=False)]
    assert "".join(pieces) == out.text[0].removeprefix("one two" * echo)


def test_what_lacks_a_method_is_no_vocabulary() -> None:
    class Half:
        EncodeAsIds = WordVocabulary.EncodeAsIds
        bos_id = eos_id = pad_id = WordVocabulary.pad_id

    message = "an object with the methods .*, got Half, which lacks DecodeIds, GetPieceSize"
    with pytest.raises(ValueError, match=message):
        Tokenizer(Half())
    with pytest.raises(ValueError, match="got int, which lacks EncodeAsIds"):
        Tokenizer(3)
    with pytest.raises(ValueError, match="was not tuned to chat"):
        Tokenizer(WordVocabulary()).require_end_of_turn()


def test_a_sampler_shows_its_sizes(twin: str) -> None:
    sampler = make_sampler(twin)
    size = sampler.engine.num_bytes
    engine = f"ModelEngine(layers=2, width=32, {size=})"
    assert repr(sampler) == f"Sampler({engine}, vocab=2048, Greedy())"
