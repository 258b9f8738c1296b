"""Blocks of Q4_0, which `q4_32` holds bit for bit: they stay quantised where they can."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import make_tokens
from gguf_files import CONFIG, gguf, trained, write_gguf

from backends import Backend
from recurrentgemma.common.errors import MissingExtraError, NonFiniteError
from recurrentgemma.common.io.arrays import BFLOAT16
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.quantization import Quantized, dequantize, quantize_parameter
from recurrentgemma.common.training.adapters import Adapters, write_adapters
from recurrentgemma.common.training.lora import LoraOptions, trainable_specs
from recurrentgemma_conversion import Format, convert, names, open_checkpoint
from recurrentgemma_conversion.names.gemma import GEMMA
from recurrentgemma_conversion.names.table import Rule
from tolerances import assert_close

MATRICES = {spec.path for spec in layer_spec(CONFIG) if spec.matrix}
TABLE = "embedder.input_embedding"
UP = "blocks.*.mlp_block.ffw_up.w"
ATTENTION = "blocks.*.attention_block."


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as it is published: the table in half precision, the matrices in Q4_0."""
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(folder / "model.gguf", "Q4_0", others={"token_embd": "F16"})


def read(path: Path, dtype: Any = None, scheme: str | None = None, **kwargs) -> dict[str, Any]:
    """What a model computes with, by path."""
    with open_checkpoint(path, **kwargs) as reader:
        return {spec.path: value for spec, value in reader.read_as(dtype, scheme)}


def kept(values: dict[str, Any]) -> set[str]:
    """The matrices that have the values of blocks: every zero is 8, as in Q4_0."""
    matrices = {path: value for path, value in values.items() if path in MATRICES}
    return {p for p, v in matrices.items() if isinstance(v, Quantized) and (v.zero == 8).all()}


def assert_exact(values: dict[str, Any], path: Path) -> None:
    """Asserts that kept matrices stand for the values that the package `gguf` reads."""
    with open_checkpoint(path) as reader:
        for spec in reader.specs:
            if spec.path in kept(values):
                value, expected = dequantize(values[spec.path]), reader.read(spec)
                assert values[spec.path].shape == spec.shape
                assert value.dtype == expected.dtype == np.float32
                np.testing.assert_array_equal(value.view(np.int32), expected.view(np.int32))


def test_blocks_stay_as_they_are(path: Path, tmp_path: Path) -> None:
    """A tensor in another encoding is bfloat16 without a scheme, and is quantised with one."""
    random = write_gguf(tmp_path / "random.gguf", "Q4_0")  # its table is in Q4_0, too
    for file in (path, random):
        for scheme in (None, "q4_32"):
            values = read(file, None, scheme)
            assert kept(values) == MATRICES
            assert_exact(values, file)
            with open_checkpoint(file) as reader:
                spec = next(spec for spec in reader.specs if spec.table)
                dense = reader.read(spec)
            table = values[TABLE]
            if scheme is None:
                np.testing.assert_array_equal(table, dense.astype(BFLOAT16))
            else:
                expected = quantize_parameter(spec, dense, scheme)
                assert table.scheme == "q8"
                np.testing.assert_array_equal(table.values, expected.values)
                np.testing.assert_array_equal(table.scale, expected.scale)


def test_a_dtype_dequantises(path: Path) -> None:
    """So does a mesh, over which quantised weights are not split."""
    dense = read(path, BFLOAT16)
    exact = read(path, np.dtype(np.float32))
    with open_checkpoint(path) as reader:
        parts = {spec.path: v for spec, v in reader.read_as(None, None, lambda spec, v: v[:1])}
        assert reader.scheme is None
        for spec in reader.specs:
            expected = reader.read(spec).astype(np.float32)
            np.testing.assert_array_equal(exact[spec.path], expected)
            np.testing.assert_array_equal(dense[spec.path], expected.astype(BFLOAT16))
            natural = expected if spec.wide else expected.astype(BFLOAT16)
            np.testing.assert_array_equal(parts[spec.path], natural[:1])
    asked = read(path, BFLOAT16, "q4_32")
    assert {asked[path].dtype for path in MATRICES} == {"bfloat16"}
    assert kept(asked) == MATRICES


def test_a_file_of_several_encodings(tmp_path: Path) -> None:
    """A half of the gate in another encoding has the whole quantised from its values."""
    others = {"blk.0.attn_q": "Q8_0", "blk.1.ffn_up": "Q4_1", "token_embd": "F16"}
    path = write_gguf(tmp_path / "model.gguf", "Q4_0", others=others)
    left = {"blocks.0.attention_block.proj_q.kernel", UP.replace("*", "1")}
    natural, asked = read(path), read(path, None, "q4_32")
    with open_checkpoint(path) as reader:
        for spec in reader.specs:
            assert reader.stored_in(spec) == ("q4_32" if spec.path in MATRICES - left else None)
            if spec.path in left:
                dense = reader.read(spec)
                np.testing.assert_array_equal(natural[spec.path], dense.astype(BFLOAT16))
                expected = quantize_parameter(spec, dense, "q4_32")
                for part, array in asked[spec.path].parts.items():
                    np.testing.assert_array_equal(array, expected.parts[part])
    for values in (natural, asked):
        assert kept(values) == MATRICES - left
        assert_exact(values, path)


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A table of names in which outputs are permuted or fused, and inputs permuted."""

    def table(config: Any) -> list[Rule]:
        changed = {f"{ATTENTION}proj_{name}.kernel" for name in ("q", "k", "v", "final")}
        kernel, stored = f"{ATTENTION}proj_{{}}.kernel", "blk.*.attn_{}.weight"
        rules = [rule for rule in plain(config) if rule.ours[0] not in changed]
        # As interleaved heads: the outputs of a head are apart.
        rules.append(Rule((kernel.format("q"),), (stored.format("q"),), "i (n h) -> (h n) i"))
        fused = (kernel.format("k"), kernel.format("v"))
        rules.append(Rule(fused, (stored.format("kv"),), "i o -> o i"))
        final = (kernel.format("final"),)
        return [*rules, Rule(final, (stored.format("output"),), "(n h) o -> o (h n)")]

    plain = GEMMA.tables[Format.GGUF]
    monkeypatch.setitem(GEMMA.tables, Format.GGUF, table)  # pyright: ignore[reportArgumentType]
    names._layout.cache_clear()
    yield
    names._layout.cache_clear()


def test_rows_in_another_order(turned: None, tmp_path: Path) -> None:
    """Values, scales and zeros move alike; with permuted inputs a matrix is quantised anew."""
    path = write_gguf(tmp_path / "model.gguf", "Q4_0", others={"token_embd": "F16"})
    final = {path for path in MATRICES if "proj_final" in path}
    values = read(path, None, "q4_32")
    assert kept(values) == MATRICES - final
    assert_exact(values, path)
    with open_checkpoint(path) as reader:
        for spec in reader.specs:
            if spec.path in final:
                expected = quantize_parameter(spec, reader.read(spec), "q4_32")
                np.testing.assert_array_equal(values[spec.path].values, expected.values)


def test_the_twins_compute_with_the_blocks(backend: Backend, path: Path, tmp_path: Path) -> None:
    """Loaded without a dtype: exact values, in bfloat16 the logits of the dequantised model, and
    saved so."""
    twin, tokens = backend.twin, make_tokens(CONFIG, 1, 8)
    positions = np.arange(8, dtype=np.int32)[None]
    module = importlib.import_module(f"recurrentgemma.{twin.name}")
    model, dense = module.load_checkpoint(path), twin.load(path, "float32")
    model = type(dense)(*model) if isinstance(model, tuple) else model  # with JAX's parameters
    held = twin.quantized(model)
    assert held.keys() == MATRICES
    assert not twin.quantized(dense)
    exact = twin.params(dense)
    for name, value in held.items():
        assert value.dtype == "bfloat16"
        np.testing.assert_array_equal(dequantize(value.with_parts(twin.to_numpy)), exact[name])
    expected = twin.forward(dense, tokens, positions).activations["logits"]
    loaded = twin.forward(model, tokens, positions).activations["logits"]
    assert_close(loaded, expected, "logits", "bfloat16")  # of PyTorch's kernel
    values = read(path) | {TABLE: exact[TABLE]}
    wide = twin.dequantizing(twin.make(CONFIG, values.items(), "float32"))
    plain = twin.forward(wide, tokens, positions).activations["logits"]
    assert_close(plain, expected, "logits", "float32")
    twin.save(tmp_path / "saved", model, trained())
    saved = read(tmp_path / "saved")
    assert kept(saved) == MATRICES
    assert_exact(saved, path)
    with pytest.raises(ValueError, match=r"cannot be trained.*\(a GGUF: with a dtype\)"):
        twin.train_state(model, gradient_checkpointing=False, state_dtype="float32")


def test_conversions(path: Path, tmp_path: Path) -> None:
    """To our format and on to another one, the values stay exact; in float32 all do."""
    said: Any = {"dtype": "float32"}
    summary = convert(path, tmp_path / "kept", Format.RECURRENTGEMMA, quantize="q4_32", **said)
    assert (summary.verified, summary.dtypes) == (True, ["q4_32", "float32"])
    values = read(tmp_path / "kept")
    assert kept(values) == MATRICES
    assert_exact(values, path)
    convert(tmp_path / "kept", tmp_path / "back", Format.HUGGINGFACE)
    convert(path, tmp_path / "plain", Format.HUGGINGFACE, **said)
    convert(path, tmp_path / "ours", Format.RECURRENTGEMMA, **said)
    assert convert(path, tmp_path / "half", Format.HUGGINGFACE).dtypes == [
        "bfloat16",
        "float16",
        "float32",
    ]
    with open_checkpoint(path) as source:
        specs = list(source.specs)
        expected = {spec.path: source.read(spec) for spec in specs}
    for name in ("back", "plain", "ours", "half"):
        with open_checkpoint(tmp_path / name) as reader:
            for spec in specs:
                if name == "half" and spec.matrix:
                    rounded = expected[spec.path].astype(BFLOAT16)
                    np.testing.assert_array_equal(reader.read(spec), rounded)
                elif spec.path != TABLE or name != "back":  # the table is q8 in between
                    np.testing.assert_array_equal(reader.read(spec), expected[spec.path])


def test_adapters_are_added_to_the_values(path: Path, tmp_path: Path) -> None:
    options, rng = LoraOptions(2, targets=("mlp",)), np.random.default_rng(0)
    specs = trainable_specs(CONFIG, options)
    arrays = {spec.path: rng.standard_normal(spec.shape).astype(np.float32) for spec in specs}
    adapters = tmp_path / "adapters.safetensors"
    write_adapters(adapters, Adapters(CONFIG, options, arrays))
    values = read(path, adapter=adapters)
    assert kept(values) == {path for path in MATRICES if "attention" in path}
    with open_checkpoint(path, adapter=adapters) as reader:
        for spec in reader.specs:
            if "ffw" in spec.path:
                np.testing.assert_array_equal(values[spec.path], reader.read(spec).astype(BFLOAT16))


def test_blocks_need_no_package(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert kept(read(path)) == MATRICES
    with pytest.raises(MissingExtraError, match=r"reading Q4_0 from a GGUF .*\[gguf\]"):
        read(path, BFLOAT16)


def test_a_scale_that_is_not_finite_is_counted(path: Path, tmp_path: Path) -> None:
    """As in any checkpoint: a conversion names the matrix."""
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_down.weight")
    content = bytearray(path.read_bytes())
    content[tensor.data_offset : tensor.data_offset + 2] = np.float16(np.inf).tobytes()
    damaged = tmp_path / "model.gguf"
    damaged.write_bytes(content)
    with pytest.raises(NonFiniteError, match=r"blocks\.0\.mlp_block\.ffw_down\.kernel: 1 values"):
        convert(damaged, tmp_path / "out", Format.RECURRENTGEMMA, quantize="q4_32")
