"""Small files of llama.cpp, with a tokenizer."""

import functools
import io
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
from cases import make_params

from recurrentgemma.common.model.gemma import GemmaConfig
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma_conversion import Format
from recurrentgemma_conversion.names import layout

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

# A row is one block of the widest encodings.
SIZES = (256, 256, 2, 4, 2, 64)
CONFIG = GemmaConfig.from_sizes(3, 400, *SIZES, sliding_window=6, rope_stretch=1.0)
TEXT = Path(__file__).parent / "conversion" / "test_gguf.py"  # the tokenizer is trained on it


@functools.cache
def trained() -> Tokenizer:
    """A tokenizer of the kind that Gemma has."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.read_text().splitlines()), model_writer=model,
        model_type="bpe", vocab_size=400, byte_fallback=True, pad_id=0, eos_id=1, bos_id=2,
        unk_id=3, user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n", "▁▁", "▁▁▁"],
        add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
        normalization_rule_name="identity", bos_piece="<bos>", eos_piece="<eos>",
    )  # fmt: skip
    return Tokenizer(model.getvalue())


def pieces() -> dict[str, list[Any]]:
    """The tokenizer as llama.cpp stores one: turns are control pieces, and spaces are plain."""
    vocab = trained().vocab
    kinds = {vocab.unk_id(): 2, vocab.bos_id(): 3, vocab.eos_id(): 3, vocab.pad_id(): 3}
    texts = [vocab.IdToPiece(i) for i in range(vocab.GetPieceSize())]
    byte = {i: 6 for i in range(len(texts)) if vocab.IsByte(i)}
    user = {i: 4 for i, text in enumerate(texts) if text in ("\n", "▁▁", "▁▁▁")}
    turns = {i: 3 for i, text in enumerate(texts) if text.endswith("_of_turn>")}
    return {
        "tokens": [text.replace("▁", " ") if set(text) == {"▁"} else text for text in texts],
        "scores": [vocab.GetScore(i) for i in range(len(texts))],
        "token_type": [(user | turns | byte | kinds).get(i, 1) for i in range(len(texts))],
    }


def write_gguf(
    path: Path,
    encoding: str = "F32",
    changes: Mapping[str, Any] | None = None,
    others: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """A file whose matrices have an encoding; quantised blocks are of random bytes.

    Args:
      path: The file to write.
      encoding: The encoding of matrices.
      changes: Metadata to add or change.
      others: The encoding of some matrices, by a part of their names. With these the blocks hold
        the values of the model.
    """
    said = {"general.architecture": "gemma3"} | dict(changes or {})
    writer = gguf.GGUFWriter(path, said.pop("general.architecture"))
    numbers = {
        "gemma3.embedding_length": 256,
        "gemma3.feed_forward_length": 256,
        "gemma3.block_count": 2,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 2,
        "gemma3.attention.key_length": 64,
        "gemma3.attention.sliding_window": 6,
    }
    for key, value in (numbers | said).items():
        writer.add_uint32(key, value)
    writer.add_float32("gemma3.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32("gemma3.rope.freq_base", 1e6)
    writer.add_tokenizer_model("llama")
    vocab = pieces()
    writer.add_token_list(vocab["tokens"])
    writer.add_token_scores(vocab["scores"])
    writer.add_token_types(vocab["token_type"])
    ids = trained()
    writer.add_bos_token_id(ids.bos_id)
    writer.add_eos_token_id(ids.eos_id)
    writer.add_pad_token_id(ids.pad_id)
    writer.add_unk_token_id(ids.vocab.unk_id())
    writer.add_add_space_prefix(False)
    rng = np.random.default_rng(0)
    params = {path: value.astype(np.float32) for path, value in make_params(CONFIG).items()}
    for name, value in layout(CONFIG, Format.GGUF).encode(lambda spec: params[spec.path]):
        array = np.ascontiguousarray(value)
        used = next((kind for part, kind in others.items() if part in name), encoding)
        kind = gguf.GGMLQuantizationType[used]
        if array.ndim == 1 or used == "F32":
            writer.add_tensor(name, array)
        elif others or used in ("F16", "BF16"):
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            values, size = gguf.GGML_QUANT_SIZES[kind]
            blocks = rng.integers(0, 256, (len(array), array.shape[1] // values, size), np.uint8)
            blocks[..., [1, 3, -3, -1]] &= 0x3B  # the high byte of a scale, wherever it is: finite
            flat = blocks.reshape(len(array), -1)
            writer.add_tensor(name, flat, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
