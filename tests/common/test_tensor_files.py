"""Tensor files, with the library `safetensors` on the other side."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from recurrentgemma.common.errors import DamagedError
from recurrentgemma.common.io.arrays import DTYPES, INTEGERS, count_nonfinite, same_bits
from recurrentgemma.common.io.tensor_files import (
    DTYPE_NAMES,
    TensorFile,
    TensorFileWriter,
    write_tensors,
)

METADATA = {"format": "pt", "note": "ä"}


def make_tensors() -> dict[str, np.ndarray]:
    """Random bits of every dtype that can be stored, and arrays of odd shapes."""
    rng = np.random.default_rng(0)
    tensors = {
        dtype.name: np.frombuffer(rng.bytes(15 * dtype.itemsize), dtype).reshape(3, 5)
        for dtype in DTYPE_NAMES
    }
    one = np.ones((), np.float32)
    return tensors | {
        "scalar": one,
        "empty": np.zeros((0, 4), np.int8),
        "strided": one + np.eye(3).T,
    }


@pytest.mark.parametrize("writer", ["ours", "library"])
@pytest.mark.parametrize("reader", ["ours", "library"])
def test_every_dtype_keeps_its_bits(tmp_path: Path, writer: str, reader: str) -> None:
    path, tensors = tmp_path / "file", make_tensors()
    assert {dtype.name for dtype in DTYPE_NAMES} == {*DTYPES, *INTEGERS}
    write = {"ours": write_tensors, "library": lambda p, t, m: save_file(t, p, m)}[writer]
    write(path, tensors, METADATA)
    if reader == "library":
        found = load_file(path)
    else:
        file = TensorFile(path)
        assert file.metadata == METADATA
        assert {n: (i.shape, i.dtype) for n, i in file.tensors.items()} == {
            name: (array.shape, array.dtype) for name, array in tensors.items()
        }
        found = {name: file.read(name) for name in file.tensors}
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert same_bits(found[name], array), name


def test_a_tensor_is_a_view_of_the_file(tmp_path: Path) -> None:
    """Writing to it changes neither the file nor what is read after it from another mapping."""
    path = tmp_path / "file"
    write_tensors(path, {"a": np.arange(4, dtype=np.int32)}, {})
    file = TensorFile(path)
    view = file.read("a")
    assert not view.flags.owndata
    assert np.shares_memory(view, file.read("a"))
    view[0] = 9
    assert TensorFile(path).read("a").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", ["bool", "int16", "uint16"])
def test_other_dtypes_are_named_when_they_are_read(tmp_path: Path, dtype: str) -> None:
    save_file({"a": np.ones(2, dtype), "b": np.ones(2, np.int8)}, tmp_path / "file")
    file = TensorFile(tmp_path / "file")
    assert file.tensors["a"][:2] == ((2,), None)
    assert file.read("b").tolist() == [1, 1]
    with pytest.raises(DamagedError, match=r"file: the dtype of a must be one of BF16, .*, I32"):
        file.read("a")


def test_integers_are_finite() -> None:
    for dtype in INTEGERS.values():
        assert count_nonfinite(np.full(7, -1).astype(dtype)) == 0


@pytest.mark.parametrize("failure", ["raised", "wrong name", "wrong shape", "rounded", "missing"])
def test_a_block_that_fails_leaves_no_file(tmp_path: Path, failure: str) -> None:
    path, declared = (
        tmp_path / "file",
        {"a": ((2,), np.dtype(np.int8)), "b": ((), DTYPES["float32"])},
    )
    name, array = {
        "wrong name": ("b", np.ones((), np.float32)),
        "wrong shape": ("a", np.ones(3, np.int8)),
        "rounded": ("a", np.ones(2, np.float32)),
    }.get(failure, ("a", np.ones(2, np.int8)))

    def fill() -> None:
        with TensorFileWriter(path, declared, {}) as writer:
            writer.write(name, array)
            if failure == "raised":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt if failure == "raised" else AssertionError):
        fill()
    assert not path.exists()


ENTRY = {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": ENTRY | {"data_offsets": [0, 9]}}, r"\d+ bytes are expected, got \d+"),
        ({"a": ENTRY | {"shape": [3]}}, "invalid shape|TensorInvalidInfo"),
        ({"a": ENTRY | {"shape": [-2]}}, "invalid value|InvalidHeader"),
        ({"a": ENTRY | {"shape": [2**63, 2**63]}}, "overflow|Overflow"),
        ({"a": ENTRY | {"dtype": "I3"}}, "unknown variant `I3`|InvalidHeader"),
        ({"a": ENTRY, "b": ENTRY}, "invalid offset for tensor `.`|InvalidOffset"),
        ({"n" * 9999: ENTRY | {"data_offsets": [1, 2]}}, "invalid|Invalid"),
        ({"__metadata__": {"a": 1}, "a": ENTRY}, "invalid type|InvalidHeader"),
        ([], "invalid type|InvalidHeader"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: object, reason: str) -> None:
    path, text = tmp_path / "file", json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"ab")
    with pytest.raises(
        DamagedError, match=f"is no complete safetensors file: .*({reason})"
    ) as info:
        TensorFile(path)
    assert len(str(info.value)) < len(str(path)) + 300


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8 + b"{}", bytes(8)])
def test_no_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DamagedError, match="file is no complete safetensors file: "):
        TensorFile(tmp_path / "file")


def test_no_file(tmp_path: Path) -> None:
    for path, error in ((tmp_path / "none", FileNotFoundError), (tmp_path, OSError)):
        with pytest.raises(error, match=os.path.basename(path)):
            TensorFile(path)


def _resident_file_bytes() -> int:
    """The memory of this process that holds pages of files."""
    return int(Path("/proc/self/status").read_text().partition("RssFile:")[2].split()[0]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give pages back when they like")
def test_what_nobody_holds_any_more_takes_no_memory(tmp_path: Path) -> None:
    size = 1 << 25
    write_tensors(tmp_path / "file", {name: np.ones(size, np.int8) for name in "abc"}, {})
    file = TensorFile(tmp_path / "file")
    arrays = {name: file.read(name) for name in "abc"}
    assert all(array.sum(dtype=int) == size for array in arrays.values())
    before = _resident_file_bytes()
    part = arrays["b"][1 : size // 2]  # holds all of it
    del arrays["a"], arrays["b"]
    assert size * 0.9 < before - _resident_file_bytes() < size * 1.1
    del part
    assert size * 1.9 < before - _resident_file_bytes() < size * 2.1
    assert file.read("a").sum(dtype=int) == size


def test_a_tensor_that_is_read_twice_is_one_array(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {"a": np.zeros(100_000, np.int8)}, {})
    file = TensorFile(tmp_path / "file")
    first, second = file.read("a"), file.read("a")
    first[:] = 1
    del second
    assert (first == 1).all()


def test_what_was_written_lives_as_long_as_a_view_of_it(tmp_path: Path) -> None:
    """Also where a neighbour in the file is given up."""
    names, size = ("a", "b", "c"), 10_001
    write_tensors(tmp_path / "file", {name: np.zeros(size, np.int8) for name in names}, {})
    file = TensorFile(tmp_path / "file")
    arrays = {name: file.read(name) for name in names}
    arrays["b"][:] = 1
    kept = arrays.pop("b").reshape(73, 137)[1:].view(np.uint8)
    del arrays
    assert (kept == 1).all()
    assert not file.read("a").any()
    assert not file.read("c").any()
