"""Quantised checkpoints for `transformers`: what `compressed-tensors` packs, and its own reading.

The bytes are unpacked here by their definition, one value at a time; where the library is installed
it opens the same folders.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import make_config, make_tokens
from checkpoints import write_checkpoint

from recurrentgemma.common.errors import ConfigError, MismatchError
from recurrentgemma.common.io.shards import WEIGHTS
from recurrentgemma.common.io.tensor_files import TensorFile, write_tensors
from recurrentgemma.common.model import reference
from recurrentgemma.common.model.gemma import GemmaConfig
from recurrentgemma.common.quantization import Quantized, dequantize
from recurrentgemma_conversion import Format, convert, open_checkpoint
from tolerances import assert_close

SIZES = (2048, 128, 256, 2, 4, 2, 32)
CONFIGS: dict[str, Any] = {
    # The last word of a row of 34 inputs, and of the zeros of 12 or 34 outputs, is not full; 34 and
    # 40 inputs are no whole groups of 32.
    "griffin": make_config(
        "RA",
        vocab_size=2048,
        width=96,
        num_heads=8,
        lru_width=40,
        mlp_expanded_width=34,
        logits_soft_cap=30.0,
    ),
    "gemma1": GemmaConfig.from_sizes(1, *SIZES),
    "gemma2": GemmaConfig.from_sizes(2, *SIZES, sliding_window=6),
    "gemma3": GemmaConfig.from_sizes(3, *SIZES, sliding_window=6),
}
CASES = [
    ("griffin", "q8"),
    ("griffin", "q4_32"),
    ("gemma1", "q4_32"),
    ("gemma2", "q4"),
    ("gemma3", "q8"),
]
DENSE = {"blocks.*.recurrent_block.linear_out.kernel", "blocks.*.mlp_block.ffw_down.kernel"}
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    """Makes a checkpoint of ours and converts it; gives both folders."""
    home, made = tmp_path_factory.mktemp("compressed"), dict[tuple[str, str], tuple[Path, Path]]()

    def make(name: str, scheme: str) -> tuple[Path, Path]:
        if (name, scheme) not in made:
            source, target = home / f"{name}-{scheme}", home / f"{name}-{scheme}-hf"
            write_checkpoint(source, Format.RECURRENTGEMMA, CONFIGS[name])
            summary = convert(source, target, "huggingface", quantize=scheme)
            assert (summary.verified, summary.dtypes) == (True, [scheme, "float32"])
            assert 0 < (target / WEIGHTS).stat().st_size - summary.bytes < 20_000
            left = next(note for note in summary.notes if note.startswith("compressed-tensors"))
            what, _, names = left.partition(": float32 for ")
            assert what == "compressed-tensors holds linear layers of whole groups"
            gates = {f"blocks.*.recurrent_block.rg_lru.{g}_gate.w" for g in ("input", "a")}
            expected = {"embedder.input_embedding"} | (gates if name == "griffin" else set())
            expected |= DENSE if (name, scheme) == ("griffin", "q4_32") else set()
            assert set(names.split(", ")) == expected
            made[name, scheme] = source, target
        return made[name, scheme]

    return make


def digits(words: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Unsigned numbers of so many bits from rows of words, the first of each word the lowest."""
    each = 32 // bits
    whole = words.astype(np.int64) & 0xFFFFFFFF
    columns = [whole[:, k // each] >> (bits * (k % each)) & (2**bits - 1) for k in range(count)]
    return np.stack(columns, 1)


def unpacked(tensors: dict[str, np.ndarray], name: str, bits: int) -> np.ndarray:
    """A weight in float32, from its definition."""
    outputs, inputs = tensors[f"{name}_shape"]
    values = digits(tensors[f"{name}_packed"], inputs, bits) - 2 ** (bits - 1)
    scale = tensors[f"{name}_scale"]
    zeros = np.zeros(scale.shape, np.int64)
    if f"{name}_zero_point" in tensors:
        zeros = digits(tensors[f"{name}_zero_point"].T, outputs, bits).T - 2 ** (bits - 1)
    group = inputs // scale.shape[1]
    spread = (np.repeat(array, group, 1) for array in (zeros, scale))
    zeros, scale = spread
    return ((values - zeros) * scale).astype(np.float32)


def linear(reader: Any, source: Any, scheme: str) -> Iterator[tuple[str, np.ndarray]]:
    """The stored name of each linear layer's weight, and its values from our own definition."""
    for spec in reader.specs:
        if reader.stored_in(spec) is not None:
            dense = dequantize(source.quantized(spec, scheme))
            for piece in reader.layout.pieces[spec.path]:
                yield piece.name, np.asarray(piece.encode(dense))


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_the_written_bytes(folder, name: str, scheme: str) -> None:
    """Unpacked by their definition they are the weights that our schemes stand for."""
    plain, target = folder(name, scheme)
    file, bits = TensorFile(target / WEIGHTS), 8 if scheme == "q8" else 4
    tensors = {name: file.read(name) for name in file.tensors}
    with open_checkpoint(plain) as source, open_checkpoint(target) as reader:
        expected = dict(linear(reader, source, scheme))
        for weight, values in expected.items():
            np.testing.assert_array_equal(unpacked(tensors, weight, bits), values)
            np.testing.assert_array_equal(reader.fetch(weight), values)
        packed = {n.removesuffix("_packed") for n in file.tensors if n.endswith("_packed")}
        assert packed == expected.keys()
        for spec in reader.specs:
            held, dense = reader.read_stored(spec), source.read(spec)
            if reader.stored_in(spec) is None:
                np.testing.assert_array_equal(np.asarray(held), dense)
                continue
            assert isinstance(held, Quantized)
            assert held.shape == spec.shape
            ours: Any = source.quantized(spec, scheme)
            for part, array in ours.parts.items():
                np.testing.assert_array_equal(held.parts[part], array)
        config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    left = ["model.layers.0.temporal_block.linear_out", "model.layers.0.mlp_block.down_proj"]
    left.append("model.layers.1.mlp_block.down_proj")
    assert config["ignore"] == ["lm_head", *(left if (name, scheme) == CASES[1] else [])]


def test_it_goes_on(folder, tmp_path: Path) -> None:
    """Our format holds the same values; every other conversion dequantises."""
    _, target = folder("gemma2", "q4")
    convert(target, tmp_path / "ours", "recurrentgemma", quantize="q4")
    convert(tmp_path / "ours", tmp_path / "back", "huggingface", quantize="q4", dtype="float32")
    convert(target, tmp_path / "dense", "huggingface")
    with (
        open_checkpoint(target) as reader,
        open_checkpoint(tmp_path / "back") as back,
        open_checkpoint(tmp_path / "dense") as dense,
    ):
        for spec in reader.specs:
            np.testing.assert_array_equal(dense.read(spec), reader.read(spec))
            if spec.matrix:
                assert back.stored_in(spec) == "q4"
                np.testing.assert_array_equal(back.read(spec), reader.read(spec))


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_transformers_opens_it(folder, name: str, scheme: str) -> None:
    """Through the library: the same weights to the bit, and our logits."""
    pytest.importorskip("torch.nn", reason="torch is not installed")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import torch

    plain, target = folder(name, scheme)
    model = transformers.AutoModelForCausalLM.from_pretrained(target).eval()
    state = model.state_dict()
    with open_checkpoint(plain) as source, open_checkpoint(target) as reader:
        for weight, values in linear(reader, source, scheme):
            np.testing.assert_array_equal(state[weight].numpy(), values)
        params, config = {spec.path: reader.read(spec) for spec in reader.specs}, reader.config
    tokens = make_tokens(config, 1, 20)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits
    expected, _ = reference.forward(config, params, tokens, np.arange(20, dtype=np.int32)[None])
    assert_close(theirs.numpy(), expected, "logits", "float32")


def changed(folder: Path, out: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]):
    """A copy whose tensors and config were changed."""
    file = TensorFile(folder / WEIGHTS)
    tensors: dict[str, Any] = {name: file.read(name) for name in file.tensors}
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    out.mkdir()
    write_tensors(out / WEIGHTS, tensors, {})
    (out / "config.json").write_text(json.dumps(config))
    return out


def words(tensors: dict[str, Any], config: Any) -> None:
    tensors[f"{UP}_packed"] = tensors[f"{UP}_packed"][:, :-1]


def groups(tensors: dict[str, Any], config: Any) -> None:
    """Each group in two, in every matrix."""
    for name in tensors:
        if name.endswith(("_scale", "_zero_point")):
            tensors[name] = np.repeat(tensors[name], 2, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, c: t.pop(f"{UP}_scale"), MismatchError, f"missing {UP}_scale"),
        (
            words,
            MismatchError,
            rf"{UP}_packed must be int32 of shape \(256, 16\), got int32 \(256, 15",
        ),
        (groups, ConfigError, "int4 weights groups of 128 or of 32 inputs; .* has int4 and 2 gr"),
        (lambda t, c: c.update(quant_method="gptq"), ConfigError, "must be compressed-tensors in"),
        (lambda t, c: c.pop("config_groups"), ConfigError, "quantization_config is incomplete"),
        (
            lambda t, c: c["config_groups"]["group_0"]["weights"].update(num_bits=3),
            ConfigError,
            "must be int4 or int8 throughout, got int3",
        ),
    ],
)
def test_what_is_wrong_is_named(folder, tmp_path: Path, change, error, message: str) -> None:
    _, target = folder("gemma2", "q4")
    path = changed(target, tmp_path / "out", change)
    with pytest.raises(error, match=message), open_checkpoint(path):
        pass
