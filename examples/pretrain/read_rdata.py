"""Reads character vectors out of an R package's lazy-load database, with the standard library.

R keeps a package's data sets in two files: `Rdata.rdb` holds compressed objects one after another,
and `Rdata.rdx` is an index with the start and length of each. Both use R's serialisation format
(XDR, big-endian; "R Internals", section 1.8). This module reads only the object types that such
data needs: lists, strings, numbers, symbols and attributes.
"""

import bz2
import gzip
import lzma
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

NIL, REFERENCE = 0xFE, 0xFF
SYMBOL, PAIRLIST, CHARACTER = 1, 2, 9
LOGICAL, INTEGER, REAL, STRINGS, LIST = 10, 13, 14, 16, 19
HAS_ATTRIBUTES, HAS_TAG, LATIN1 = 1 << 9, 1 << 10, 1 << 14


class RValue(NamedTuple):
    """An R vector: its elements, and its attributes (names, class, ...) by name."""

    items: list[Any]
    attributes: dict[str, Any]

    def named(self) -> dict[str, Any]:
        """The elements keyed by R's `names` attribute."""
        names = self.attributes.get("names")
        return {} if names is None else dict(zip(names.items, self.items, strict=True))


class _Reader:
    """One pass over one serialised object; `references` numbers the symbols seen so far."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.references: list[Any] = []

    def take(self, count: int) -> bytes:
        chunk = self.data[self.position : self.position + count]
        if count < 0 or len(chunk) < count:
            raise ValueError("R data ends in the middle of an object: the file is damaged")
        self.position += count
        return chunk

    def integer(self) -> int:
        return struct.unpack(">i", self.take(4))[0]

    def document(self) -> Any:
        if self.take(2) != b"X\n":
            raise ValueError("not R data in XDR format (it should begin with 'X' and a newline)")
        version, _writer, _oldest_reader = self.integer(), self.integer(), self.integer()
        if version not in (2, 3):
            raise ValueError(f"R serialisation version must be 2 or 3, got {version}")
        if version == 3:
            self.take(self.integer())  # the native encoding's name
        return self.item()

    def item(self) -> Any:
        flags = self.integer()
        kind = flags & 0xFF
        if kind == NIL:
            return None
        if kind == REFERENCE:
            return self.references[(flags >> 8 or self.integer()) - 1]
        if kind == SYMBOL:
            self.references.append(self.item())
            return self.references[-1]
        if kind == CHARACTER:
            length = self.integer()
            if length == -1:
                return None  # NA
            return self.take(length).decode("latin-1" if flags & LATIN1 else "utf-8")
        if kind == PAIRLIST:
            return self.pairlist(flags)
        if kind in (LOGICAL, INTEGER):
            count = self.integer()
            items = list(struct.unpack(f">{count}i", self.take(4 * count)))
        elif kind == REAL:
            count = self.integer()
            items = list(struct.unpack(f">{count}d", self.take(8 * count)))
        elif kind in (STRINGS, LIST):
            items = [self.item() for _ in range(self.integer())]
        else:
            raise ValueError(f"R object type {kind} is not one that plain text data uses")
        return RValue(items, (self.item() or {}) if flags & HAS_ATTRIBUTES else {})

    def pairlist(self, flags: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        while flags & 0xFF == PAIRLIST:
            if flags & HAS_ATTRIBUTES:
                self.item()
            tag = self.item() if flags & HAS_TAG else f"[{len(pairs)}]"
            pairs[tag] = self.item()
            flags = self.integer()
        return pairs


def _decompress(block: bytes, compression: int) -> bytes:
    """An object's bytes; `compression` 1 is zlib, 2 and 3 name the method in the fifth byte."""
    if compression == 0:
        return block
    body = block[4:]  # after the unpacked length
    if compression == 1:
        return zlib.decompress(body)
    method, body = body[:1], body[1:]
    if method == b"Z":
        return lzma.decompress(body, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
    if method == b"2":
        return bz2.decompress(body)
    return body if method == b"0" else zlib.decompress(body)


def read_string_vectors(index: bytes, database: bytes) -> dict[str, list[str]]:
    """Every character vector of a lazy-load database, by name; missing values are empty strings.

    Args:
        index: the contents of `Rdata.rdx`.
        database: the contents of `Rdata.rdb`.
    """
    table = _Reader(gzip.decompress(index)).document().named()
    compression = int(table["compressed"].items[0])
    vectors: dict[str, list[str]] = {}
    for name, where in table["variables"].named().items():
        offset, length = (int(number) for number in where.items)
        block = database[offset : offset + length]
        value = _Reader(_decompress(block, compression)).document()
        if isinstance(value, RValue) and all(isinstance(x, str | None) for x in value.items):
            vectors[name] = [x or "" for x in value.items]
    return vectors


def read_deb_member(deb: Path, suffix: str) -> bytes:
    """The file whose path ends in `suffix` from a Debian package, without dpkg.

    A .deb is an `ar` archive (8-byte magic, then 60-byte headers) that holds `data.tar.*`.
    """
    import io
    import tarfile

    raw = deb.read_bytes()
    if raw[:8] != b"!<arch>\n":
        raise ValueError(f"{deb.name} is not a Debian package")
    position = 8
    while position + 60 <= len(raw):
        name = raw[position : position + 16].decode("ascii").strip().rstrip("/")
        size = int(raw[position + 48 : position + 58])
        body = raw[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
        if not name.startswith("data.tar"):
            continue
        try:
            with tarfile.open(fileobj=io.BytesIO(body)) as archive:
                for entry in archive:
                    if entry.name.endswith(suffix) and (file := archive.extractfile(entry)):
                        return file.read()
        except tarfile.ReadError as error:
            raise ValueError(
                f"{deb.name} is compressed as {name}, which Python cannot read: "
                "use Debian's own package, which is data.tar.xz"
            ) from error
    raise ValueError(f"{deb.name} holds no file ending in {suffix}")
