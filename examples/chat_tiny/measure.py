"""Measures a chat model: greedy answers to questions in words that it was not trained on."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.progress import track

from recurrentgemma.common.messages import encode_messages, read_messages

BATCH = 64
LONGEST = 100  # tokens of an answer
FREE = "Free questions"


class Answer(NamedTuple):
    """What the model says, and whether it ended its turn."""

    text: str
    ended: bool


class Share(NamedTuple):
    """How many answers there are, are right, are word for word the expected ones, and end."""

    asked: int
    right: int
    exact: int
    ended: int

    def __add__(self, other: "Share") -> "Share":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Share(*(a + b for a, b in zip(self, other, strict=True)))


def answers(sampler: Any, conversations: Sequence[list[dict[str, str]]]) -> list[Answer]:
    """The greedy answer to the last message of each conversation."""
    prompts = [
        [token for turn, _ in encode_messages(read_messages(c, answered=False), sampler.tokenizer)
         for token in turn]
        for c in conversations
    ]  # fmt: skip
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Answer] = {}
    for start in track(range(0, len(order), BATCH), "Asking"):
        rows = order[start : start + BATCH]
        out = sampler([prompts[i] for i in rows], LONGEST)
        reasons = out.finish_reasons or []
        for i, text, reason in zip(rows, out.text, reasons, strict=True):
            found[i] = Answer(text, reason == "end_of_turn")
    return [found[i] for i in range(len(prompts))]


def shares(tests: Iterable[Mapping[str, Any]], said: Iterable[Answer]) -> dict[str, Share]:
    """The counts by what the tests are about, and over all of them as "All"."""
    counts: dict[str, Share] = {}
    for test, answer in zip(tests, said, strict=True):
        right = answer.ended and test["key"] in answer.text
        exact = answer.ended and answer.text == test.get("answer")
        one = Share(1, right, exact, answer.ended)
        counts[test["about"]] = counts.get(test["about"], Share(0, 0, 0, 0)) + one
    total = Share(0, 0, 0, 0)
    for count in counts.values():
        total += count
    return counts | {"All": total}
