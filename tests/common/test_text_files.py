"""Text files as people have them."""

import gzip
import io

import pytest

from recurrentgemma.common.io.jsonl import read_lines
from recurrentgemma.common.io.text import as_utf8, text_of

TEXT = "In the beginning\n“É” 日本\n\nlast"
FORMS = {
    "plain": TEXT.encode(),
    "mark": TEXT.encode("utf-8-sig"),
    "crlf": TEXT.replace("\n", "\r\n").encode(),
    "crlf and mark": TEXT.replace("\n", "\r\n").encode("utf-8-sig"),
    "utf-16": TEXT.encode("utf-16"),
    "utf-16 of the other order": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "powershell": TEXT.replace("\n", "\r\n").encode("utf-16"),
    "gzip": gzip.compress(TEXT.encode(), mtime=0),
    "gzip of utf-16": gzip.compress(TEXT.encode("utf-16"), mtime=0),
}


@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS)
def test_a_text_is_the_same_in_any_form(data: bytes) -> None:
    assert text_of(data, "file") == TEXT


def test_short_texts() -> None:
    for text in ("", "a", "ab", "abc", "\n", "é"):
        assert text_of(text.encode(), "file") == text
        assert text_of(text.encode("utf-16"), "file") == text
    assert text_of(b"a\rb", "file") == "a\rb"  # no end of a line on any system of today


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TEXT.encode("utf-16-le"), "file must be UTF-8 text, got UTF-16 or UTF-32"),
        (TEXT.encode("utf-16-be"), "file must be UTF-8 text, got UTF-16 or UTF-32"),
        (TEXT.encode("utf-32"), "file must be UTF-8 text, got UTF-16 or UTF-32"),
        ("é".encode("latin-1"), "file must be UTF-8 text, got byte 0xe9 at 0"),
        (b"\xff\xfea", "file is damaged UTF-16 at byte 2"),
        (gzip.compress(b"a" * 99, mtime=0)[:-9], "file is a damaged gzip file"),
        (b"\x1f\x8bnot gzip at all", "file is a damaged gzip file"),
    ],
)
def test_what_is_no_text(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_of(data, "file")


@pytest.mark.parametrize("form", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_in_any_form(form: str, pack) -> None:
    data = pack('"a"\r\n\r\n{"prompt": "日本"}\r\n'.encode(form))
    lines = read_lines(data, "file")
    assert [(line.number, line.fields) for line in lines] == [
        (1, {"prompt": "a"}),
        (3, {"prompt": "日本"}),
    ]


def test_a_stream_is_read_as_it_comes() -> None:
    """Not as a whole: a file of training data may be large."""

    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            buffer[:] = (b'{"text": "a"}\n' * (len(buffer) // 14 + 1))[: len(buffer)]
            return len(buffer)

    assert as_utf8(io.BufferedReader(Endless()), "file").readline() == b'{"text": "a"}\n'
