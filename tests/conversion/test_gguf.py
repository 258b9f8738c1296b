"""Files of llama.cpp: every encoding that is read, the tokenizer, and what is wrong with a file."""

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
from cases import make_params
from gguf_files import CONFIG, gguf, trained, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import sweep

from recurrentgemma.common import errors
from recurrentgemma.common.io.arrays import BFLOAT16
from recurrentgemma.common.io.checkpoint import load_tokenizer
from recurrentgemma.common.quantization import Quantized, quantize_parameter
from recurrentgemma_conversion import Format, convert, detect, open_checkpoint
from recurrentgemma_conversion.convert import WRITERS
from recurrentgemma_conversion.readers.gguf import ENCODINGS
from recurrentgemma_conversion.readers.gguf_tokenizer import sentencepiece_model

QUANTISED = [encoding.name for encoding in ENCODINGS.values() if not encoding.dtype]
WHOLE = [encoding.name for encoding in ENCODINGS.values() if encoding.dtype]


@pytest.mark.parametrize("encoding", QUANTISED)
def test_what_is_quantised_is_read_exactly(tmp_path: Path, encoding: str) -> None:
    """`fetch` gives float32; without a choice a model has matrices in bfloat16."""
    path = write_gguf(tmp_path / "model.gguf", encoding)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with open_checkpoint(path) as reader:
        assert reader.config == CONFIG
        for spec in reader.specs:
            dtype = np.dtype(np.float32) if spec.path.endswith("scale") else BFLOAT16
            assert reader.dtypes[spec.path] == dtype
        for name, tensor in stored.items():
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
            expected = expected.reshape(reader.tensors[name].shape)
            np.testing.assert_array_equal(reader.fetch(name), expected)
        assert reader.fetch("blk.0.ffn_up.weight").std() > 0
        norm = stored["blk.1.ffn_norm.weight"].data
        spec = next(s for s in reader.specs if s.path == "blocks.1.channel_pre_norm.scale")
        np.testing.assert_array_equal(reader.read(spec), norm - np.float32(1))


@pytest.mark.parametrize("scheme", ["q8", "q4"])
def test_what_is_quantised_is_quantised_again(tmp_path: Path, scheme: str) -> None:
    """Its groups of 32 have other steps than these schemes."""
    with open_checkpoint(write_gguf(tmp_path / "model.gguf", "Q4_0")) as reader:
        for spec, value in reader.read_as(None, scheme):
            expected = quantize_parameter(spec, reader.read(spec), scheme)
            assert isinstance(value, Quantized) == isinstance(expected, Quantized)
            if isinstance(value, Quantized):
                np.testing.assert_array_equal(value.values, expected.values)
                np.testing.assert_array_equal(value.scale, expected.scale)


def test_eight_bits_by_hand(tmp_path: Path) -> None:
    """Q8_0: the scale of 32 values in half precision, and the values."""
    path = write_gguf(tmp_path / "model.gguf", "Q8_0")
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    blocks = np.asarray(tensor.data).reshape(400, 8, 34)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    expected = (scale * blocks[..., 2:].view(np.int8)).reshape(400, 256)
    with open_checkpoint(path) as reader:
        np.testing.assert_array_equal(reader.fetch("token_embd.weight"), expected)


@pytest.mark.parametrize("encoding", WHOLE)
def test_what_is_not_quantised_keeps_its_dtype(tmp_path: Path, encoding: str) -> None:
    dtype = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16}[encoding]
    params = make_params(CONFIG)
    with open_checkpoint(write_gguf(tmp_path / "model.gguf", encoding)) as reader:
        for spec, value in reader:
            assert value.dtype == (np.float32 if spec.path.endswith("scale") else dtype)
            stored = params[spec.path].astype(np.float32)
            if spec.path.endswith("scale"):
                np.testing.assert_allclose(value, stored, rtol=0, atol=2.4e-7)
            else:
                np.testing.assert_array_equal(value, stored.astype(dtype))


def test_the_tokenizer_is_made_again(tmp_path: Path) -> None:
    path, published = write_gguf(tmp_path / "model.gguf"), trained()
    convert(path, tmp_path / "ours", Format.RECURRENTGEMMA)
    with open_checkpoint(path) as reader:
        assert reader.tokenizer == path
        tokenizers = [reader.load_tokenizer(), load_tokenizer(tmp_path / "ours")]
    for tokenizer in tokenizers:
        for name in ("bos_id", "eos_id", "pad_id", "end_of_turn_id", "size"):
            assert getattr(tokenizer, name) == getattr(published, name)
        for text in ("In   the file", "a  b\n c", "<start_of_turn>user\nEmma", "é́ 漢\t🥭", ""):
            assert tokenizer.encode(text) == published.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_of_another_kind(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"]}
    with pytest.raises(errors.TokenizerError, match=r"model must be 'llama', .* got 'gpt2'"):
        sentencepiece_model(tmp_path, metadata)


def test_it_is_only_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    assert detect(tmp_path) == (Format.GGUF, path)
    assert Format.GGUF not in WRITERS
    with pytest.raises(errors.DestinationError, match="gguf is only read: the result must be"):
        convert(path, tmp_path / "out", Format.GGUF)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("gemma3n", "Gemma 3n"),
        ("gemma4", "Gemma 4"),
        ("clip", "the vision encoder of a model"),
        ("llama", "a model that is not read"),
    ],
)
def test_another_architecture(tmp_path: Path, architecture: str, name: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", changes={"general.architecture": architecture})
    words = f"holds {name}.*architecture must be one of 'gemma', .* got '{architecture}'"
    with pytest.raises(errors.OtherModelError, match=words), open_checkpoint(path):
        pass


def test_an_encoding_that_is_not_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "IQ4_XS")
    words = r"are read are F32, .*; got IQ4_XS in token_embd\.weight and 14 more$"
    with pytest.raises(errors.UnknownFormatError, match=words), open_checkpoint(path):
        pass


@pytest.mark.parametrize("kept", [3, 10, 24, 200, 5_000, 0.5, -1])
def test_a_file_that_is_cut_short(tmp_path: Path, kept: float) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    size = int(len(whole) * kept) if isinstance(kept, float) else kept
    path = tmp_path / "cut" / "model.gguf"
    path.parent.mkdir()
    path.write_bytes(whole[:size])
    expected = errors.UnknownFormatError if kept == 3 else errors.DamagedError
    words = "no Orbax checkpoint" if kept == 3 else "is cut short"
    with pytest.raises(expected, match=words), open_checkpoint(path):
        pass


def test_a_missing_key(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", changes={"general.architecture": "gemma2"})
    with (
        pytest.raises(errors.ConfigError, match=r"lacks gemma2\.attention"),
        open_checkpoint(path),
    ):
        pass


def test_sizes_of_no_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", changes={"gemma3.attention.key_length": 1})
    with pytest.raises(errors.ConfigError, match="must be an even integer"), open_checkpoint(path):
        pass


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", "Q4_0")


@settings(max_examples=sweep(60, 2_000))
@given(data=st.data())
def test_a_damaged_header_is_read_or_refused(small: Path, data: st.DataObject) -> None:
    """Keys, sizes and types are before the texts of the tokenizer; offsets come after them."""
    content, near = bytearray(small.read_bytes()), st.integers(4, 600)
    tail = st.integers(12_000, 14_000)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(near | tail)] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        path.write_bytes(content)
        with contextlib.suppress(errors.CheckpointError), open_checkpoint(path) as reader:
            assert [spec.path for spec, _ in reader] == [spec.path for spec in reader.specs]
