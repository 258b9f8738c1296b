"""Checkpoints that are quantised on the way, and what is wrong with quantised ones."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cases import make_config, make_params

from recurrentgemma.common import quantization
from recurrentgemma.common.errors import (
    ConfigError,
    DestinationError,
    MismatchError,
    NonFiniteError,
)
from recurrentgemma.common.io.arrays import BFLOAT16
from recurrentgemma.common.io.checkpoint import BUNDLED, load_tokenizer
from recurrentgemma.common.io.shards import WEIGHTS
from recurrentgemma.common.io.tensor_files import TensorFile, write_tensors
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.quantization import Quantized, dequantize
from recurrentgemma_conversion import Format, convert, open_checkpoint
from recurrentgemma_conversion.readers.native import save_folder

NAME = "blocks.2.mlp_block.ffw_up.w"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in q4_32."""
    path = tmp_path_factory.mktemp("quantized") / "q4_32"
    summary = convert(BUNDLED, path, Format.RECURRENTGEMMA, quantize="q4_32")
    assert (summary.dtypes, summary.verified) == (["q4_32", "bfloat16"], True)
    assert summary.bytes < (path / WEIGHTS).stat().st_size < summary.bytes + 50_000
    return path


def test_it_is_read_as_it_is_stored(folder: Path) -> None:
    """Views of the file; `read` dequantises, which other formats and `merge` need."""
    assert json.loads((folder / "config.json").read_text())["quantization"] == {
        "scheme": "q4_32",
        "dtype": "bfloat16",
    }
    assert "q4_32" in TensorFile(folder / WEIGHTS).metadata["quantization"]
    with open_checkpoint(BUNDLED) as plain, open_checkpoint(folder) as reader:
        assert (reader.scheme, reader.config) == ("q4_32", plain.config)
        assert reader.dtypes == plain.dtypes
        for spec in reader.specs:
            value, expected = reader.quantized(spec, None), plain.quantized(spec, "q4_32")
            if not isinstance(expected, Quantized):
                np.testing.assert_array_equal(np.asarray(value), np.asarray(expected))
                continue
            assert isinstance(value, Quantized)
            assert value.axis == expected.axis
            for part, array in value.parts.items():
                np.testing.assert_array_equal(array, expected.parts[part])
                assert not array.flags.owndata
            dense = dequantize(expected).astype(BFLOAT16)
            np.testing.assert_array_equal(reader.read(spec), dense)


def test_it_goes_on_as_it_is_or_dequantised(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "same", Format.RECURRENTGEMMA)
    assert (tmp_path / "same" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    convert(folder, tmp_path / "plain", Format.RECURRENTGEMMA, dtype="bfloat16")
    convert(folder, tmp_path / "theirs", Format.HUGGINGFACE)
    with (
        open_checkpoint(folder) as reader,
        open_checkpoint(tmp_path / "plain") as plain,
        open_checkpoint(tmp_path / "theirs") as theirs,
    ):
        assert plain.scheme is None
        for spec in reader.specs:
            np.testing.assert_array_equal(reader.read(spec), plain.read(spec))
            np.testing.assert_array_equal(reader.read(spec), theirs.read(spec))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (".scale", lambda array: array[:, :-1], r"ffw_up.w.scale must have shape \(2, 768, 8\)"),
        (".scale", lambda array: array.astype(np.float64), "ffw_up.w.scale must be float32, got"),
        (".zero", lambda array: None, "missing blocks.2.mlp_block.ffw_up.w.zero"),
        ("", lambda array: array.view(np.int8), "ffw_up.w must be uint8, got int8"),
    ],
)
def test_damaged_parts_are_named(folder: Path, tmp_path: Path, part, change, message: str) -> None:
    file = TensorFile(folder / WEIGHTS)
    tensors = {name: file.read(name) for name in file.tensors}
    changed = change(tensors.pop(NAME + part))
    if changed is not None:
        tensors[NAME + part] = changed
    write_tensors(tmp_path / WEIGHTS, tensors, file.metadata)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(MismatchError, match=message), open_checkpoint(tmp_path):
        pass


def test_what_cannot_be_quantised(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is quantised as q4_32 already"):
        convert(folder, tmp_path / "out", Format.RECURRENTGEMMA, quantize="q8")
    with pytest.raises(DestinationError, match="or huggingface, got kaggle-flax with q8"):
        convert(BUNDLED, tmp_path / "out", Format.KAGGLE_FLAX, quantize="q8")
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization"]["scheme"] = "q2"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    with (
        pytest.raises(ConfigError, match="must be one of q8, q4, q4_32, got 'q2'"),
        open_checkpoint(tmp_path),
    ):
        pass
    config = make_config("A", width=40, vocab_size=2048)
    params = make_params(config) | {"final_norm.scale": np.zeros(40)}
    dtypes = {spec.path: np.dtype(np.float32) for spec in layer_spec(config)}
    save_folder(tmp_path / "odd", config, dtypes, lambda s: params[s.path], load_tokenizer())
    with pytest.raises(ValueError, match=r"groups of 32 divide, got blocks.0.*proj_q.kernel.* 40"):
        convert(tmp_path / "odd", tmp_path / "out", Format.RECURRENTGEMMA, quantize="q4_32")
    kernel = np.array(params["blocks.0.mlp_block.ffw_down.kernel"])
    kernel[0, 0] = np.nan
    params = params | {"blocks.0.mlp_block.ffw_down.kernel": kernel}
    save_folder(tmp_path / "nan", config, dtypes, lambda s: params[s.path], load_tokenizer())
    with pytest.raises(NonFiniteError, match=r"ffw_down\.kernel: 1 values"):
        convert(tmp_path / "nan", tmp_path / "out", Format.RECURRENTGEMMA, quantize="q8")
    assert not (tmp_path / "out").exists()


def test_one_matrix_is_in_memory_at_a_time(tmp_path: Path, monkeypatch) -> None:
    """NumPy holds no more than the largest tensor in bfloat16 and a few strips."""
    strip = 1 << 16
    monkeypatch.setattr(quantization, "_STRIP", strip)
    config = make_config("RA" * 3, width=512, mlp_expanded_width=2048, vocab_size=2048 * 4)
    dtypes = {spec.path: BFLOAT16 for spec in layer_spec(config)}
    rng = np.random.default_rng(0)
    block = rng.standard_normal(1 << 16).astype(BFLOAT16)
    tokenizer = load_tokenizer()
    tokenizer.fits = lambda size: True  # type: ignore[method-assign]
    save_folder(tmp_path / "in", config, dtypes, lambda s: np.resize(block, s.shape), tokenizer)
    tracemalloc.start()
    try:
        summary = convert(
            tmp_path / "in", tmp_path / "out", Format.RECURRENTGEMMA, quantize="q8", verify=False
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    largest = max(2 * spec.size for spec in layer_spec(config))
    assert summary.bytes > 2 * largest
    assert peak < largest + 8 * 4 * strip
