"""Bytes and headers changed at random: a named error or a whole result, and nothing else."""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from cases import make_config
from checkpoints import files, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from junk import mutate

from recurrentgemma.common.errors import CheckpointError
from recurrentgemma_conversion import Format, Overrides, convert, open_checkpoint

pytest.importorskip("torch.nn", reason="torch is not installed")
ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")

CONFIG = make_config("RA", vocab_size=2048, width=8, mlp_expanded_width=4, lru_width=4)
OVERRIDES = Overrides(None, True, 8, 5.0)
LONGEST = 20  # seconds; a hang would be longer
KINDS = [*Format, "ocdbt", "shards", "archive"]


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


def assert_served_or_refused(source: Path, before: dict[str, bytes]) -> None:
    """It converts wholly, or a named error leaves nothing."""
    out = source.with_name("out")
    started = time.perf_counter()
    try:
        convert(source, out, Format.HUGGINGFACE, overrides=OVERRIDES, allow_nonfinite=True)
    except CheckpointError:
        assert not out.exists()
    else:
        with open_checkpoint(out) as reader:
            assert sum(1 for _ in reader) > 0
    assert time.perf_counter() - started < LONGEST
    assert files(source) == before
    assert {path.name for path in source.parent.iterdir()} <= {"source", "out"}


@given(data=st.data())
@settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "25")))
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


@given(data=st.data())
@settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "25")))
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
