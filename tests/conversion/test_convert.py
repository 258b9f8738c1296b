"""Every format into every other: nothing is lost, and the formats' own readers accept it."""

import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CONFIGS, files, parameters, write_checkpoint
from sweeps import sweep

from recurrentgemma.common.errors import DamagedError
from recurrentgemma.common.io.arrays import DTYPES, same_bits
from recurrentgemma.common.model import reference
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.state_dict import to_torch, torch_name
from recurrentgemma_conversion import Format, Overrides, convert, open_checkpoint
from recurrentgemma_conversion.convert import WRITERS
from recurrentgemma_conversion.readers import kaggle_flax

pytest.importorskip("torch.nn", reason="torch is not installed")
import torch

ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")

PAIRS = list(itertools.permutations(WRITERS, 2))


def assert_holds(path: Path, config: GriffinConfig, expected: dict[str, np.ndarray]) -> None:
    with open_checkpoint(path) as reader:
        assert reader.config == config
        read = {spec.path: value for spec, value in reader}
    assert list(read) == [spec.path for spec in layer_spec(config)]
    for name, value in read.items():
        assert same_bits(value, expected[name]), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips_of_all_ordered_pairs_are_bit_exact(
    tmp_path: Path, name: str, dtype: str
) -> None:
    config = CONFIGS[name]
    for format_ in WRITERS:
        write_checkpoint(tmp_path / format_, format_, config, dtype)
    # Each pair once in each dtype, with another config in the other dtype.
    first = (list(CONFIGS).index(name) + (dtype == "float32")) % len(CONFIGS)
    for one, other in sweep(PAIRS[first :: len(CONFIGS)], PAIRS):
        there, back = tmp_path / f"{one}-{other}", tmp_path / f"{one}-{other}-{one}"
        summary = convert(tmp_path / one, there, other)
        assert (summary.source_format, summary.format) == (one, other)
        assert summary.dtypes == [dtype]
        assert summary.verified
        assert_holds(there, config, parameters(config, dtype))
        convert(there, back, one)
        assert files(back) == files(tmp_path / one), (one, other)
    assert len(PAIRS) == 12


@pytest.mark.parametrize("format_", WRITERS)
def test_a_format_into_itself(tmp_path: Path, make, format_: Format) -> None:
    source = make("source", format_)
    convert(source, tmp_path / "copy", format_)
    assert files(tmp_path / "copy") == files(source)


GOLDEN_PATHS = [
    "flax/tiny",
    "flax/tiny-bf16",
    "flax_zarr/tiny",
    "flax_save_parameters/tiny",
    "flax_orbax059_ocdbt/tiny",
    "flax_orbax059_ocdbt/tiny-bf16",
    "flax_orbax059_zarr/tiny",
    "flax_orbax059_zarr/tiny-bf16",
    "pytorch/tiny.pt",
    "pytorch/tiny-bf16.pt",
    "hf/tiny",
]


@pytest.mark.parametrize("path", GOLDEN_PATHS)
def test_published_layouts(tmp_path: Path, golden: Path, path: str) -> None:
    config = GriffinConfig.from_json((golden / "outputs/tiny.config.json").read_text())
    overrides = Overrides(None, True, config.attention_window_size, config.logits_soft_cap)
    convert(
        golden / path,
        tmp_path / "out",
        Format.RECURRENTGEMMA,
        overrides=overrides,
        tokenizer=golden / "tokenizer.model",
    )
    expected = torch.load(golden / f"pytorch/{Path(path).stem}.pt", weights_only=True)
    expected = {name: value.float().numpy() for name, value in expected.items()}
    with open_checkpoint(tmp_path / "out") as reader:
        assert reader.config == config
        assert {torch_name(spec.path) for spec in reader.specs} == set(expected)
        for spec, value in reader:
            stored = to_torch(spec.path, value.astype(np.float32))
            name = torch_name(spec.path)
            np.testing.assert_array_equal(stored, expected[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_written_state_dicts_are_plain(make, dtype: str) -> None:
    config = CONFIGS["attention_last"]
    path = make("out", Format.KAGGLE_TORCH, config, dtype) / "model.pt"
    expected = parameters(config, dtype)
    for mmap in (True, False):
        state = torch.load(path, weights_only=True, mmap=mmap)
        assert list(state) == [torch_name(spec.path) for spec in layer_spec(config)]
        for spec in layer_spec(config):
            value = state[torch_name(spec.path)]
            assert value.dtype == getattr(torch, dtype)
            assert value.is_contiguous()
            stored = to_torch(spec.path, expected[spec.path].astype(np.float32))
            np.testing.assert_array_equal(value.float().numpy(), stored)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # the checksums are right, too
        for entry in archive.infolist():
            assert (entry.header_offset + 30 + len(entry.filename) + len(entry.extra)) % 64 == 0


@pytest.mark.parametrize("ocdbt", [False, True], ids=["zarr", "ocdbt"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_written_directories_load_with_plain_orbax(
    tmp_path: Path, make, monkeypatch, dtype: str, ocdbt: bool
) -> None:
    monkeypatch.setattr(kaggle_flax, "_CHUNK", 1000)  # several chunks
    config = CONFIGS["griffin"]
    source = make("source", Format.HUGGINGFACE, config, dtype)
    convert(source, tmp_path / "out", Format.KAGGLE_FLAX, ocdbt=ocdbt)
    path = tmp_path / "out/model"
    assert (path / "manifest.ocdbt").is_file() == ocdbt
    convert(tmp_path / "out", tmp_path / "back", Format.HUGGINGFACE)
    assert files(tmp_path / "back") == files(source)
    expected = parameters(config, dtype)
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(path)
    assert set(tree) == {"embedder", "final_norm", *(f"blocks.{i}" for i in range(5))}
    leaves = {}

    def walk(node, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                leaves[prefix + key] = np.asarray(value)

    walk(tree, "")
    assert set(leaves) == set(expected)
    for name, value in leaves.items():
        assert same_bits(value, expected[name]), name


@pytest.mark.parametrize("name", ["griffin", "attention_last"])
def test_written_folders_load_in_transformers_with_the_same_logits(make, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    # Its port always scales embeddings and caps logits.
    fields = {"logits_soft_cap": 30.0, "embeddings_scale_by_sqrt_dim": True}
    config = GriffinConfig(**CONFIGS[name].to_dict() | fields)
    folder = make("out", Format.HUGGINGFACE, config)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert type(model).__name__ == "RecurrentGemmaForCausalLM"
    assert not any(info.values()), info
    assert model.config.num_key_value_heads == 1
    assert model.config.attention_window_size == config.attention_window_size + 1
    tokens = np.arange(3 * config.attention_window_size)[None] * 7 % 2048
    expected, _ = reference.forward(
        config, parameters(config, "float32"), tokens, np.arange(tokens.shape[1])[None]
    )
    with torch.no_grad():
        logits = model(torch.as_tensor(tokens)).logits
    np.testing.assert_allclose(logits.numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("format_", [Format.HUGGINGFACE, Format.RECURRENTGEMMA])
def test_shards(tmp_path: Path, make, format_: Format) -> None:
    source = make("source", Format.KAGGLE_TORCH)
    convert(source, tmp_path / "out", format_, shard_size=30_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    total = sum(value.nbytes for value in parameters(CONFIGS["griffin"], "float32").values())
    assert index["metadata"]["total_size"] == total
    embedding = 2048 * 24 * 4  # alone in its file: it is larger than a shard may be
    assert all(shard.stat().st_size < embedding + 5000 for shard in shards)
    assert_holds(tmp_path / "out", CONFIGS["griffin"], parameters(CONFIGS["griffin"], "float32"))
    convert(tmp_path / "out", tmp_path / "back", Format.KAGGLE_TORCH)
    assert files(tmp_path / "back") == files(source)
    if format_ is Format.HUGGINGFACE:
        transformers = pytest.importorskip("transformers")
        _, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
        assert not any(info.values()), info


@pytest.mark.parametrize("name", sweep(["a%20b p#q p?q"], ["a%20b", "p#q", "p?q"]))
def test_databases_in_folders_whose_names_urls_would_quote(tmp_path: Path, make, name: str) -> None:
    source = make("source", Format.KAGGLE_FLAX)
    convert(source, tmp_path / name / "database", Format.KAGGLE_FLAX, ocdbt=True)
    convert(tmp_path / name / "database", tmp_path / name / "back", Format.KAGGLE_FLAX)
    assert files(tmp_path / name / "back") == files(source)
    assert {path.name for path in tmp_path.iterdir()} == {"source", name}


def test_the_fill_value_of_an_absent_chunk(make) -> None:
    source = make("source", Format.KAGGLE_FLAX)
    array = source / "model/final_norm.scale"
    metadata = json.loads((array / ".zarray").read_text())
    (array / ".zarray").write_text(json.dumps(metadata | {"fill_value": 0.5}))
    (array / "0").unlink()
    expected = parameters(CONFIGS["griffin"], "float32")
    expected["final_norm.scale"] = np.full(24, 0.5, np.float32)
    assert_holds(source, CONFIGS["griffin"], expected)


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_chunks_in_folders(make, refused, num_chunks: int) -> None:
    source, name = make("source", Format.KAGGLE_FLAX), "blocks.0.mlp_block.ffw_down.kernel"
    array, expected = source / "model" / name, parameters(CONFIGS["griffin"], "float32")
    metadata = json.loads((array / ".zarray").read_text()) | {"dimension_separator": "/"}
    metadata["chunks"][0] //= num_chunks
    (array / ".zarray").write_text(json.dumps(metadata))
    (array / "0.0").unlink()
    for i, rows in enumerate(np.split(expected[name], num_chunks)):
        (array / str(i)).mkdir()
        (array / str(i) / "0").write_bytes(rows.tobytes())
    assert_holds(source, CONFIGS["griffin"], expected)
    (array / "0" / "0").unlink()
    refused(source, DamagedError, "lacks 1 chunks", f"{name}/0/0")


def test_state_dicts_whose_records_are_compressed(tmp_path: Path, make) -> None:
    """As a program that packs a zip archive anew leaves them: they cannot be mapped."""
    source = make("source", Format.KAGGLE_TORCH)
    convert(source, tmp_path / "expected", Format.RECURRENTGEMMA)
    with zipfile.ZipFile(source / "model.pt") as records:
        content = {name: records.read(name) for name in records.namelist()}
    with zipfile.ZipFile(source / "model.pt", "w", zipfile.ZIP_DEFLATED) as records:
        for name, record in content.items():
            records.writestr(name, record)
    convert(source, tmp_path / "out", Format.RECURRENTGEMMA)
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_tensors_whose_negative_bit_is_set(make) -> None:
    path = make("source", Format.KAGGLE_TORCH) / "model.pt"
    state = torch.load(path)
    for name, tensor in state.items():
        state[name] = torch.complex(tensor, -tensor).conj().imag
        assert state[name].is_neg()
    torch.save(state, path)
    assert_holds(path, CONFIGS["griffin"], parameters(CONFIGS["griffin"], "float32"))


@pytest.mark.parametrize("format_", WRITERS)
def test_casts_round_to_nearest_even(tmp_path: Path, make, format_: Format) -> None:
    config = CONFIGS["griffin"]
    # Halfway between two bfloat16 values: down to the even 1, and up to the even 1 + 2^-6.
    halves = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8)] * 8, np.float32)
    source = make("source", Format.KAGGLE_TORCH, changes={"final_norm.scale": halves})
    convert(source, tmp_path / "out", format_, dtype="bfloat16")
    with open_checkpoint(tmp_path / "out") as reader:
        read = {spec.path: value for spec, value in reader}
    np.testing.assert_array_equal(
        read["final_norm.scale"].astype(np.float32),
        np.array([1, 1 + 2**-6, -1] * 8, np.float32),
    )
    for name, value in parameters(config, "float32").items():
        if name != "final_norm.scale":
            expected = torch.from_numpy(value.copy()).bfloat16().float().numpy()
            np.testing.assert_array_equal(read[name].astype(np.float32), expected)
    convert(tmp_path / "out", tmp_path / "wide", format_, dtype="float32")
    with open_checkpoint(tmp_path / "wide") as reader:
        assert set(reader.dtypes.values()) == {DTYPES["float32"]}


def test_mixed_dtypes_stay_mixed(tmp_path: Path, make) -> None:
    config = CONFIGS["recurrent"]
    wide = {s.path: "float32" for s in layer_spec(config) if s.path.endswith("a_param")}
    dtypes = {s.path: DTYPES[wide.get(s.path, "bfloat16")] for s in layer_spec(config)}
    folder = make("source", Format.HUGGINGFACE, config, "bfloat16", dtypes=wide)
    for format_ in WRITERS:
        summary = convert(folder, tmp_path / format_, format_)
        assert summary.dtypes == ["bfloat16", "float32"]
        with open_checkpoint(tmp_path / format_) as reader:
            assert reader.dtypes == dtypes
