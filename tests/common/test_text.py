"""Text to tokens and back, with the bundled tokenizer."""

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrentgemma.common.io.checkpoint import BUNDLED
from recurrentgemma.common.padding import pad_left
from recurrentgemma.common.tokenizer import StreamDecoder, Tokenizer, apply_it_formatter

TEXTS = [
    "In the beginning God created the heavens and the earth.",
    "  two spaces,\n\ttabs\n\nand lines  ",
    "naïve façade – “quoted”…",
    "日本語 русский עברית",
    "🐎👩‍🚀 family: 👨‍👩‍👧‍👦",
    "\U0001f3f4\U000e0067\U000e0062",
    "",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(BUNDLED / "tokenizer.model")


def stream(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.add(token) for token in tokens), decoder.flush()]


# ------------------------------------------------------------------------------------ tokenizer


def test_special_tokens(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.vocab
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert tokenizer.end_of_turn_id is not None
    assert vocab.id_to_piece(tokenizer.end_of_turn_id) == "<end_of_turn>"
    assert tokenizer.size == vocab.get_piece_size() == 2048


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokens[0] == tokenizer.bos_id
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode([*tokens, tokenizer.eos_id, tokenizer.pad_id]) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ab\udfff", r"text must be Unicode text, got an unpaired surrogate, '\\udfff', at 2"),
        (b"x", "text must be a str, got bytes: b'x'"),
        (5, "text must be a str, got int: 5"),
    ],
)
def test_the_error_names_bad_text(tokenizer: Tokenizer, text, message: str) -> None:
    for use in (tokenizer.encode, apply_it_formatter):
        with pytest.raises(ValueError, match=message):
            use(text)


def test_the_empty_text_is_a_bos(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == [tokenizer.bos_id]


def test_accepts_a_processor(tokenizer: Tokenizer) -> None:
    vocab = spm.SentencePieceProcessor(model_file=str(BUNDLED / "tokenizer.model"))
    assert Tokenizer(vocab).encode("a") == tokenizer.encode("a")
    assert Tokenizer(str(BUNDLED / "tokenizer.model")).encode("a") == tokenizer.encode("a")


def test_bad_files(tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"no tokenizer at .*: tokenizer\.model or tokenizer\.json is exp"
    ):
        Tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"no model at all")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a sentencepiece model"):
        Tokenizer(tmp_path / "tokenizer.model")


# ------------------------------------------------------------------------------------ chat template


def test_chat_template(tokenizer: Tokenizer) -> None:
    text = apply_it_formatter("Who are you?\nTell me.")
    assert text == (
        "<start_of_turn>user\nWho are you?\nTell me.<end_of_turn>\n<start_of_turn>model\n"
    )
    assert apply_it_formatter("") == ("<start_of_turn>user\n<end_of_turn>\n<start_of_turn>model\n")
    pieces = [tokenizer.vocab.id_to_piece(token) for token in tokenizer.encode(text)]
    assert pieces.count("<start_of_turn>") == 2
    assert pieces.count("<end_of_turn>") == 1
    assert pieces[1] == "<start_of_turn>"


# ------------------------------------------------------------------------------------ streaming


def check_stream(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    parts = stream(tokenizer, tokens)
    assert "".join(parts) == tokenizer.decode(tokens)
    return parts


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.vocab.encode(text)
    parts = check_stream(tokenizer, tokens)
    assert "".join(parts) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
    # Certain text comes at once: the decoder holds back only the start of one character.
    done = ""
    for i, part in enumerate(parts[:-1], 1):
        done += part
        whole = tokenizer.decode(tokens[:i])
        assert done == whole.rstrip("\N{REPLACEMENT CHARACTER}")


def test_bytes_of_a_character_come_together(tokenizer: Tokenizer) -> None:
    pieces = [f"<0x{byte:02X}>" for byte in "🐎é".encode()]
    tokens = [tokenizer.vocab.piece_to_id(piece) for piece in pieces]
    assert tokenizer.vocab.unk_id() not in tokens
    assert check_stream(tokenizer, tokens) == ["", "", "", "🐎", "", "é", ""]


@given(text=st.text(max_size=30))
def test_any_text(tokenizer: Tokenizer, text: str) -> None:
    check_stream(tokenizer, tokenizer.vocab.encode(text))


@given(tokens=st.lists(st.integers(0, 2047), max_size=25))
@settings(max_examples=60)
def test_any_tokens(tokenizer: Tokenizer, tokens: list[int]) -> None:
    """Also special tokens, and bytes that make no character."""
    check_stream(tokenizer, tokens)


@given(data=st.binary(max_size=12))
@settings(max_examples=60)
def test_any_bytes(tokenizer: Tokenizer, data: bytes) -> None:
    tokens = [tokenizer.vocab.piece_to_id(f"<0x{byte:02X}>") for byte in data]
    check_stream(tokenizer, tokens)


def test_special_tokens_print_nothing(tokenizer: Tokenizer) -> None:
    hello = tokenizer.vocab.encode("Hello there")
    end = tokenizer.end_of_turn_id
    assert end is not None
    tokens = [tokenizer.bos_id, *hello, end, tokenizer.eos_id, tokenizer.pad_id]
    assert "".join(check_stream(tokenizer, tokens)) == "Hello there"


# ------------------------------------------------------------------------------------ padding


def test_pad_left() -> None:
    tokens, segment_pos = pad_left([[5, 6, 7], [], [8]], pad_id=9)
    np.testing.assert_array_equal(tokens, [[5, 6, 7], [9, 9, 9], [9, 9, 8]])
    np.testing.assert_array_equal(segment_pos, [[0, 1, 2], [-1, -1, -1], [-1, -1, 0]])
    assert tokens.dtype == segment_pos.dtype == np.int32
    tokens, segment_pos = pad_left([[5, 6]], pad_id=0, length=4)
    np.testing.assert_array_equal(tokens, [[0, 0, 5, 6]])
    np.testing.assert_array_equal(segment_pos, [[-1, -1, 0, 1]])
    tokens, segment_pos = pad_left([], pad_id=0)
    assert tokens.shape == segment_pos.shape == (0, 0)


def test_pad_left_to_too_short_a_length() -> None:
    with pytest.raises(ValueError, match="at least the longest prompt's 3, got 2"):
        pad_left([[1, 2, 3], [4]], pad_id=0, length=2)


def test_the_decoder_keeps_no_history(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    tokens = tokenizer.vocab.encode("And it came to pass in those days, " * 50)
    text = "".join(decoder.add(token) for token in tokens)
    assert text == tokenizer.decode(tokens)
    assert len(decoder._tokens) == 1


def test_many_tokens_at_once_say_what_one_after_another_says(tokenizer: Tokenizer) -> None:
    piece_of, rng = tokenizer.vocab.piece_to_id, np.random.default_rng(0)
    words = tokenizer.vocab.encode("And it came to pass, née é 日本 \N{GRINNING FACE}" * 3)
    odd = [*(piece_of(f"<0x{byte:02X}>") for byte in b"a\x80\x9f\xf0\xe2\xc3"), 0, 1, 2, 300]
    for share in np.linspace(0, 1, 200):
        tokens = [int(rng.choice(odd)) if rng.random() < share else word for word in words]
        one, several = StreamDecoder(tokenizer), StreamDecoder(tokenizer)
        text, at = "", 0
        while at < len(tokens):
            end = at + int(rng.integers(1, 12))
            text, at = text + several.extend(tokens[at:end]), end
        expected = "".join(map(one.add, tokens)) + one.flush()
        assert text + several.flush() == expected


def test_invalid_bytes_are_not_held_back_for_ever(tokenizer: Tokenizer) -> None:
    """The decoder holds back only bytes that more bytes can complete; all text comes out."""
    piece_of = tokenizer.vocab.piece_to_id
    decoder = StreamDecoder(tokenizer)
    printed = [decoder.add(piece_of("<0x80>")) for _ in range(100)]
    assert "".join(printed) == "\ufffd" * 97
    assert len(decoder._tokens) == 4
    assert decoder.flush() == "\ufffd" * 3
    rng = np.random.default_rng(0)
    pieces = [*(piece_of(f"<0x{byte:02X}>") for byte in b"a\x80\x9f\xf0\xe2\xc3"), 0, 1, 2, 300]
    for _ in range(500):
        tokens = rng.choice(pieces, size=12).tolist()
        decoder = StreamDecoder(tokenizer)
        text = "".join(map(decoder.add, tokens))
        assert text + decoder.flush() == tokenizer.decode(tokens)
