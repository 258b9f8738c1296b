"""State files: in both frameworks, as before, and damaged by hand and at random.

A damaged file gives a named error or a state that can be continued.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from junk import mutate
from safetensors.numpy import load, load_file, save
from samplers import SUBMODULES, make_sampler
from sweeps import sweep

from recurrentgemma.common.io.arrays import same_bits
from recurrentgemma.common.model.state import StateError

TEXTS = ["In the beginning God created the heavens and the earth", "x"]  # beyond the window, within
OTHER = {"jax": "torch", "torch": "jax"}


@pytest.fixture(scope="module")
def sampler():
    pytest.importorskip(SUBMODULES["torch"], reason="torch is not installed")
    return make_sampler("torch")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("states") / "state"


@pytest.fixture(scope="module")
def data(sampler, path: Path) -> bytes:
    sampler.save_state(path, sampler.prefill(TEXTS), notes={"about": "x"})
    return path.read_bytes()


def metadata_of(data: bytes) -> dict[str, str]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def as_before(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """A file as earlier versions wrote it: "seen" comes first, the header is padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    arrays = {"seen": arrays["seen"], **arrays}
    for name, array in arrays.items():
        dtype = {"uint8": "U8", "int32": "I32", "float32": "F32", "bfloat16": "BF16"}
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": dtype[array.dtype.name], "shape": array.shape,
                        "data_offsets": [begin, end]}  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in arrays.values())


@pytest.mark.parametrize("form", [save, as_before])
def test_a_whole_file_is_read(sampler, path: Path, data: bytes, form) -> None:
    path.write_bytes(form(load(data), metadata_of(data)))
    expected = sampler.generate(sampler.prefill(TEXTS), 5).text
    assert sampler.generate(sampler.load_state(path), 5).text == expected


@pytest.mark.parametrize(
    ("twin", "dtype"),
    sweep(
        [("jax", "float32"), ("torch", "bfloat16")],
        list(itertools.product(OTHER, ["float32", "bfloat16"])),
    ),
)
def test_the_bits_survive_in_the_other_framework(tmp_path: Path, twin: str, dtype: str) -> None:
    for module in SUBMODULES.values():
        pytest.importorskip(module, reason="one of the frameworks is not installed")
    one, other = (make_sampler(name, dtype=dtype) for name in (twin, OTHER[twin]))
    one.save_state(tmp_path / "one", one.prefill(TEXTS))
    other.save_state(tmp_path / "other", other.load_state(tmp_path / "one"))
    first, second = load_file(tmp_path / "one"), load_file(tmp_path / "other")
    assert first["blocks.1.keys"].dtype.name == first["blocks.0.conv1d_state"].dtype.name == dtype
    assert first["blocks.0.rg_lru_state"].dtype.name == "float32"
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert same_bits(second[name], array), name


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("config", ["[]", "5", "null"]),
        ("lengths", ["5", "null", "[]", '["a", 0]', "[-3, 0]", "[1.5, 0]", "[true, 0]"]),
        ("lengths", ["[1]", "[3, 0]", f"[{10**30}, 0]"]),
        ("pending", ["5", "{}", "[]", "[5, 6]", "[[], [2]]", "[[2], [2], [2]]", "[[2.0], [2]]"]),
        ("pending", ["[[-1], [2]]", "[[2048], [2]]", '[["a"], [2]]', "[[true], [2]]"]),
        ("notes", ["5", "[]", "null", '{"about": 5}']),
    ],
)
def test_bad_metadata_is_named(
    sampler, path: Path, data: bytes, field: str, values: list[str]
) -> None:
    arrays, metadata = load(data), metadata_of(data)
    for value in values:
        path.write_bytes(save(arrays, {**metadata, field: value}))
        with pytest.raises(StateError, match=f"{path}.*(\n  .*)*{field}"):
            sampler.load_state(path)
    path.write_bytes(save(arrays, {k: v for k, v in metadata.items() if k != field}))
    with pytest.raises(StateError, match=f"{path} is no complete state file: .*{field}"):
        sampler.load_state(path)


def nan(value: np.ndarray) -> np.ndarray:
    return np.full_like(value, np.nan)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("seen", lambda z: z[:, 1:], r"seen must be U8 of shape \(2, 256\), got U8 of \(2, 255\)"),
        ("seen", lambda z: z.astype(np.int32), r"seen must be U8 .*, got I32 of \(2, 256\)"),
        ("blocks.0.rg_lru_state", nan, r"rg_lru_state must be finite, got 64 values that are not"),
        ("blocks.1.keys", nan, r"blocks\.1\.keys must be finite"),
        ("blocks.0.rg_lru_state", lambda z: z.astype(np.int32), "one of BF16, .*, got I32"),
        ("blocks.1.num_tokens", lambda z: z + 1, r"num_tokens must be I32 and lengths, \[.*, 1\]"),
        ("blocks.1.num_tokens", lambda z: -z - 1, r"got I32 and \[-.*, -2\]"),
        ("blocks.1.num_tokens", lambda z: z.astype(np.float32), "num_tokens .*, got F32 and"),
        ("blocks.0.conv1d_state", lambda z: z[:1], r"batch size 2 expected, got \[1, 2\]"),
        ("blocks.0.conv1d_state", lambda z: z[..., 1:], r"must have shape \[B, 3, 32\]"),
    ],
)
def test_bad_arrays_are_named(
    sampler, path: Path, data: bytes, name: str, change, message: str
) -> None:
    arrays, metadata = load(data), metadata_of(data)
    path.write_bytes(save({**arrays, name: change(arrays[name])}, metadata))
    with pytest.raises(StateError, match=f"{path}.*(\n  .*)*{message}"):
        sampler.load_state(path)


def test_arrays_that_are_missing_or_too_many(sampler, path: Path, data: bytes) -> None:
    arrays, metadata = load(data), metadata_of(data)
    path.write_bytes(save({"seen": arrays["seen"]}, metadata))
    with pytest.raises(StateError, match=r"lengths is \[\d+, 1\], but there are no arrays"):
        sampler.load_state(path)
    path.write_bytes(save({**arrays, "blocks.9.keys": np.zeros(2, np.float32)}, metadata))
    with pytest.raises(StateError, match=r"unexpected blocks\.9\.keys"):
        sampler.load_state(path)


def test_notes_must_be_strings(sampler, path: Path) -> None:
    with pytest.raises(ValueError, match=r"notes must be strings by name, got {'turn': 3}"):
        sampler.save_state(path, sampler.prefill("x"), notes={"turn": 3}, force=True)


def assert_served_or_refused(sampler, path: Path, content: bytes) -> None:
    """The state can be continued, or a named error names the file."""
    path.write_bytes(content)
    try:
        state = sampler.load_state(path)
    except StateError as error:
        message = str(error)
        assert message.startswith(str(path))
        assert len(message) < 5000
    else:
        logits = sampler.generate(state, 1, return_logits=True).logits
        assert all(np.isfinite(row).all() for row in map(np.asarray, logits))


@given(drawn=st.data())
@settings(max_examples=sweep(25, 2000))
def test_metadata(sampler, path: Path, data: bytes, drawn: st.DataObject) -> None:
    arrays, metadata = load(data), metadata_of(data)
    field = drawn.draw(st.sampled_from(["config", "lengths", "pending", "notes"]))
    value = json.dumps(mutate(json.loads(metadata[field]), drawn))
    assert_served_or_refused(sampler, path, save(arrays, {**metadata, field: value}))


@given(drawn=st.data())
@settings(max_examples=sweep(25, 2000))
def test_headers(sampler, path: Path, data: bytes, drawn: st.DataObject) -> None:
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(mutate(json.loads(data[8:start]), drawn)).encode()
    content = len(header).to_bytes(8, "little") + header + data[start:]
    assert_served_or_refused(sampler, path, content)


@pytest.mark.parametrize("text", [b"[" * 200_000, b"[]", b"5", b'{"__metadata__": "a"}', b"\xff"])
def test_headers_that_are_none(sampler, path: Path, data: bytes, text: bytes) -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(StateError, match="is no complete state file: ") as error:
        sampler.load_state(path)
    assert len(str(error.value)) < 500
    path.write_bytes(b"\xff" * 8 + data[8:])
    with pytest.raises(StateError, match="is no complete state file: ") as error:
        sampler.load_state(path)
    assert len(str(error.value)) < 500
