"""Bytes and headers changed at random: a named error or a whole result, and nothing else."""

import json
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
from cases import make_config
from checkpoints import files, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from junk import mutate
from sweeps import sweep

from recurrentgemma.common.errors import CheckpointError
from recurrentgemma_conversion import Format, Overrides, convert, open_checkpoint
from recurrentgemma_conversion.convert import WRITERS

pytest.importorskip("torch.nn", reason="torch is not installed")
ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")

CONFIG = make_config("RA", vocab_size=2048, width=8, mlp_expanded_width=4, lru_width=4)
OVERRIDES = Overrides(None, True, 8, 5.0)
LONGEST = 20  # seconds of this process, whatever else runs; a loop would be longer
EXAMPLES = sweep(10, 500)
KINDS = [*WRITERS, "ocdbt", "shards", "archive"]


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    if isinstance(request.param, Format):
        return write_checkpoint(root / "source", request.param, CONFIG)
    base = write_checkpoint(root / "base", Format.KAGGLE_FLAX, CONFIG)
    if request.param == "shards":
        convert(base, root / "source", Format.HUGGINGFACE, shard_size=20_000)
    elif request.param == "archive":
        (root / "source").mkdir()
        shutil.make_archive(str(root / "source/archive"), "gztar", base)
    else:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(root / "source/2b", checkpointer.restore(base / "model"))
    return root / "source"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """What is put into archives."""
    return write_checkpoint(tmp_path_factory.mktemp("fuzz") / "plain", Format.KAGGLE_FLAX, CONFIG)


def assert_served_or_refused(source: Path, before: dict[str, bytes]) -> None:
    """It converts wholly, or a named error leaves nothing."""
    out = source.with_name("out")
    started = time.process_time()
    try:
        convert(source, out, Format.HUGGINGFACE, overrides=OVERRIDES, allow_nonfinite=True)
    except CheckpointError:
        assert not out.exists()
    else:
        with open_checkpoint(out) as reader:
            assert sum(1 for _ in reader) > 0
    assert time.process_time() - started < LONGEST
    assert files(source) == before
    assert {path.name for path in source.parent.iterdir()} <= {"source", "out"}


@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_bytes(source: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        copy = Path(shutil.copytree(source, Path(name) / "source"))
        path = data.draw(st.sampled_from(sorted(f for f in copy.rglob("*") if f.is_file())))
        content = bytearray(path.read_bytes())
        # Headers are at the start, and a zip's directory at the end.
        near_edge = st.integers(0, min(3000, len(content) - 1))
        places = st.one_of(near_edge, near_edge.map(lambda i: len(content) - 1 - i))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "delete"]))
        if kind == "flip":
            for place in data.draw(st.lists(places, min_size=1, max_size=5)):
                content[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[data.draw(places) :]
        elif kind == "insert":
            place = data.draw(places)
            content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            place = data.draw(places)
            del content[place : place + data.draw(st.integers(1, 9))]
        path.write_bytes(content)
        assert_served_or_refused(copy, files(copy))


# Where each field of a tar header is, and what damage or another program may put there.
TAR_FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "prefix": (345, 155),
}
TAR_JUNK = st.one_of(
    st.binary(max_size=12),
    st.sampled_from([b"model.pt", b"model.pt/x", b"..", b"/", b".", b"\xff" * 12, b"7" * 12]),
    st.sampled_from([b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"S", b"g", b"x"]),
)
PAX_KEYS = ["path", "linkpath", "size", "mtime", "uid", "hdrcharset"]
PAX_KEYS += [f"GNU.sparse.{key}" for key in ("map", "size", "major", "minor", "realsize", "name")]
PAX_JUNK = st.one_of(
    st.text(max_size=9),
    st.sampled_from(["a,b", "0,1", "-1", "1e30", "nan", "inf", "1", "9" * 30, "x" * 300, "../x"]),
)


@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_headers_of_archives(plain: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "source/archive.tar"
        path.parent.mkdir()
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            archive.add(plain, ".")
            member = tarfile.TarInfo("x")
            member.pax_headers = data.draw(st.dictionaries(st.sampled_from(PAX_KEYS), PAX_JUNK))
            archive.addfile(member)
        content = bytearray(path.read_bytes())
        headers = [i for i in range(0, len(content), 512) if content[i + 257 : i + 262] == b"ustar"]
        for _ in range(data.draw(st.integers(0, 3))):
            start = data.draw(st.sampled_from(headers))
            offset, size = data.draw(st.sampled_from(sorted(TAR_FIELDS.values())))
            field = data.draw(TAR_JUNK)[:size].ljust(size, b"\0")
            content[start + offset : start + offset + size] = field
            content[start + 148 : start + 156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
        path.write_bytes(content)
        assert_served_or_refused(path.parent, files(path.parent))


@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_headers(source: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        copy = Path(shutil.copytree(source, Path(name) / "source"))
        found = [f for f in sorted(copy.rglob("*")) if f.suffix in (".json", ".safetensors")]
        found += sorted(copy.rglob("*.zarray"))
        if not found:
            return  # nothing here has a header of JSON
        path = data.draw(st.sampled_from(found))
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            end = 8 + int.from_bytes(content[:8], "little")
            header = json.dumps(mutate(json.loads(content[8:end]), data)).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
        else:
            path.write_text(json.dumps(mutate(json.loads(content), data)))
        assert_served_or_refused(copy, files(copy))


def test_pieces_of_another_kind_are_skipped() -> None:
    """As sentencepiece does with a field that is a number where it wants bytes."""
    from recurrentgemma_conversion.readers.huggingface_tokenizer import _parse

    piece = bytes([0x0A, 3, 0x0A, 1, 0x61])
    assert [p.text for p in _parse(bytes([0x08, 7]) + piece).pieces] == ["a"]
    assert [p.text for p in _parse(bytes([0x0A, 2, 0x08, 7]) + piece).pieces] == ["", "a"]
