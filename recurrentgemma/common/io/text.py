"""Text files as people have them: with a byte order mark, CRLF, UTF-16, gzip."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from typing import BinaryIO, cast

from recurrentgemma.common.errors import UserError

_GZIP = b"\x1f\x8b"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # what PowerShell writes
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)


def as_utf8(file: BinaryIO, name: str) -> BinaryIO:
    """A text file as UTF-8 without a byte order mark. The UTF-8 itself is not checked.

    Args:
      file: UTF-8 or UTF-16 with a byte order mark, perhaps compressed by gzip.
      name: Its name in errors.

    Raises:
      ValueError: It is UTF-16 without a byte order mark, or damaged.
    """
    buffered = _buffered(file)
    if buffered.peek(2)[:2] == _GZIP:
        try:
            buffered = _buffered(io.BytesIO(gzip.decompress(buffered.read())))
        except _DAMAGED as error:
            raise UserError(f"{name} is a damaged gzip file: {error}") from error
    start = buffered.peek(4)[:4]
    if b"\0\0" in (start[0::2], start[1::2], start[2:]):
        raise UserError(f"{name} must be UTF-8 text, got UTF-16 or UTF-32: save it as UTF-8")
    if start[:2] in _UTF16:
        try:
            return io.BytesIO(buffered.read().decode("utf-16").encode())
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is damaged UTF-16 at byte {error.start}") from error
    if start[:3] == codecs.BOM_UTF8:
        buffered.read(3)
    return buffered


def _buffered(file: BinaryIO) -> io.BufferedReader:
    if isinstance(file, io.BufferedReader):
        return file
    return io.BufferedReader(cast(io.RawIOBase, file))


def text_of(data: bytes, name: str) -> str:
    """The text of a file, its lines ended by newlines alone.

    Raises:
      ValueError: It is no text; the message has its name.
    """
    data = as_utf8(io.BytesIO(data), name).read()
    try:
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} must be UTF-8 text, got byte 0x{data[error.start]:02x} at {error.start}"
        ) from error
