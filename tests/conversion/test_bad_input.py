"""What is wrong is named, all of it, and nothing is written."""

import errno
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CONFIGS, files, write_orbax

from recurrentgemma.common import errors
from recurrentgemma.common.io import tensor_files
from recurrentgemma.common.io.shards import ShardsWriter
from recurrentgemma.common.io.tensor_files import TensorFile, write_tensors
from recurrentgemma_conversion import Format, Overrides, convert, detect, open_checkpoint
from recurrentgemma_conversion.convert import WRITERS
from recurrentgemma_conversion.names import layout
from recurrentgemma_conversion.readers import kaggle_flax, kaggle_torch

pytest.importorskip("torch.nn", reason="torch is not installed")
import torch

ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")

CONFIG = CONFIGS["griffin"]
OVERRIDES = Overrides(None, True, 8, 5.0)  # what its shapes do not tell


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Changes the tensors of a safetensors file."""
    file = TensorFile(path)
    tensors = {name: np.array(file.read(name)) for name in file.tensors}
    change(tensors)
    path.unlink()
    write_tensors(path, tensors, {})


def test_all_differences_are_listed(make, refused) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.final_norm.weight"]
        tensors["extra"] = np.zeros(3, np.float32)
        tensors["model.layers.0.mlp_block.down"] = tensors.pop(
            "model.layers.0.mlp_block.down_proj.bias"
        )
        name = "model.layers.2.temporal_block.k_proj.weight"
        tensors[name] = tensors[name].T.copy()

    source = make("source", Format.HUGGINGFACE)
    rewrite(source / "model.safetensors", change)
    refused(
        source,
        errors.MismatchError,
        "5 differences",
        "missing model.final_norm.weight (24,)",
        "unexpected extra (3,)",
        "missing model.layers.0.mlp_block.down_proj.bias (24,)",
        "unexpected model.layers.0.mlp_block.down (24,)",
        "model.layers.2.temporal_block.k_proj.weight must have shape (12, 24), got (24, 12)",
    )


@pytest.mark.parametrize("format_", [Format.KAGGLE_TORCH, Format.KAGGLE_FLAX])
def test_all_differences_are_listed_without_a_config(make, refused, format_: Format) -> None:
    source = make("source", format_)
    (source / "config.json").unlink()
    if format_ is Format.KAGGLE_TORCH:
        state = torch.load(source / "model.pt")
        state["extra"] = state.pop("final_norm.scale")
        del state["blocks.4.mlp_block.ffw_up.b"]
        torch.save(state, source / "model.pt")
    else:
        (source / "model/final_norm.scale").rename(source / "model/extra")
        shutil.rmtree(source / "model/blocks.4.mlp_block.ffw_up.b")
    refused(
        source,
        errors.MismatchError,
        "missing final_norm.scale (24,)",
        "unexpected extra (24,)",
        "missing blocks.4.mlp_block.ffw_up.b (2, 1, 1, 32)",
        overrides=OVERRIDES,
    )


def test_tensors_that_give_the_sizes_are_missing_and_there_is_no_config(make, refused) -> None:
    source = make("source", Format.KAGGLE_TORCH)
    (source / "config.json").unlink()
    whole = torch.load(source / "model.pt")
    giving = ("blocks.0.mlp_block.ffw_up.w", "blocks.0.recurrent_block.rg_lru.a_param")
    torch.save({n: v for n, v in whole.items() if n not in giving}, source / "model.pt")
    missing = [f"missing {name}" for name in giving]
    refused(source, errors.MismatchError, "2 differences", *missing, overrides=OVERRIDES)
    giving = ("embedder.input_embedding", "mlp_block.ffw_up.w", "rg_lru.a_param")
    torch.save({n: v for n, v in whole.items() if not n.endswith(giving)}, source / "model.pt")
    refused(
        source,
        errors.ConfigError,
        "no 'embedder.input_embedding', no 'blocks.0.mlp_block.ffw_up.w', "
        "no 'blocks.0.recurrent_block.rg_lru.a_param'",
        overrides=OVERRIDES,
    )


def test_integers_are_no_parameters(make, refused) -> None:
    source = make("source", Format.KAGGLE_TORCH)
    state = torch.load(source / "model.pt")
    state["final_norm.scale"] = state["final_norm.scale"].to(torch.int32)
    torch.save(state, source / "model.pt")
    refused(source, errors.MismatchError, "final_norm.scale must be of a dtype among bfloat16")


def test_a_head_beside_the_tied_embedding(tmp_path: Path, make, refused, monkeypatch) -> None:
    source = make("source", Format.HUGGINGFACE)

    def tie(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def untie(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"][3, 4] += 1

    rewrite(source / "model.safetensors", tie)
    convert(source, tmp_path / "tied", Format.HUGGINGFACE)
    names = set(TensorFile(tmp_path / "tied/model.safetensors").tensors)
    assert names == set(layout(CONFIG, Format.HUGGINGFACE).shapes)
    rewrite(source / "model.safetensors", untie)
    refused(source, errors.MismatchError, "unexpected lm_head.weight (2048, 24): it must be")
    with monkeypatch.context() as patch:
        patch.setattr(TensorFile, "read", None)  # opening reads no weights
        with open_checkpoint(source) as reader:
            assert reader.config == CONFIG
    rewrite(source / "model.safetensors", lambda ts: ts.update({"lm_head.weight": np.ones(3)}))
    refused(source, errors.MismatchError, "unexpected lm_head.weight (3,): it must be")


@pytest.mark.parametrize("format_", WRITERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_named(
    tmp_path: Path, make, refused, format_: Format, value: float
) -> None:
    embedding = np.ones((2048, 24), np.float32)
    embedding[5, 6] = embedding[2047, 23] = value
    scale = np.full(24, value, np.float32)
    source = make(
        "source", format_, CONFIG, "bfloat16",
        {"embedder.input_embedding": embedding, "final_norm.scale": scale},
    )  # fmt: skip
    refused(
        source,
        errors.NonFiniteError,
        "embedder.input_embedding: 2 values",
        "final_norm.scale: 24 values",
    )
    summary = convert(source, tmp_path / "kept", format_, allow_nonfinite=True)
    assert summary.nonfinite == {"embedder.input_embedding": 2, "final_norm.scale": 24}
    assert files(tmp_path / "kept") == files(source)


def test_values_that_the_new_dtype_cannot_hold(make, refused) -> None:
    largest = np.full(24, np.finfo(np.float32).max, np.float32)
    source = make("source", Format.KAGGLE_TORCH, changes={"final_norm.scale": largest})
    refused(source, errors.NonFiniteError, "final_norm.scale: 24 values", dtype="bfloat16")


def gemma(path: Path, kind: str) -> Path:
    path.mkdir()
    tensors = {
        "huggingface": {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"},
        "huggingface without config": {"model.embed_tokens.weight", "model.layers.0.self_attn.x"},
        "torch": {"embedder.weight", "model.layers.0.self_attn.qkv_proj.weight"},
        "torch in a level of its own": {"embedder.weight", "layers.0.self_attn.qkv_proj.weight"},
        "flax": {"transformer/layer_0/attn/attn_vec_einsum", "transformer/embedder"},
    }[kind]
    state = {name: torch.ones(4, 4) for name in tensors}
    if kind == "torch":
        torch.save(state, path / "model.pt")
    elif kind.startswith("torch"):
        torch.save({"model_state_dict": state}, path / "gemma-2b.ckpt")
    elif kind == "flax":
        tree: dict = {}
        for name in tensors:
            *parents, leaf = name.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = np.ones((4, 4), np.float32)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path / "2b", tree)
    else:
        if kind == "huggingface":
            (path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
        ones = dict.fromkeys(tensors, np.ones((4, 4), np.float32))
        write_tensors(path / "model.safetensors", ones, {})
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("huggingface", "lacks 'num_hidden_layers'"),
        ("huggingface without config", "lacks config.json"),
        ("torch", "not the parameters of a Gemma: no layers"),
        ("torch in a level of its own", "not the parameters of a Gemma: no layers"),
        ("flax", "not the parameters of a Gemma: no embedder"),
    ],
)
def test_what_a_gemma_lacks_is_named(tmp_path: Path, refused, kind: str, message: str) -> None:
    refused(gemma(tmp_path / "gemma", kind), errors.ConfigError, message)


def test_tokenizers(tmp_path: Path, make, refused) -> None:
    source = make("source", Format.KAGGLE_TORCH, CONFIGS["griffin"])
    (source / "tokenizer.model").rename(tmp_path / "pieces")
    refused(
        source, errors.TokenizerError, "no tokenizer.model or tokenizer.json beside the weights"
    )
    (tmp_path / "text").write_text("not a tokenizer")
    refused(source, errors.TokenizerError, "not a sentencepiece", tokenizer=tmp_path / "text")
    refused(source, errors.TokenizerError, "no tokenizer at", tokenizer=tmp_path / "absent")
    convert(source, tmp_path / "without", Format.HUGGINGFACE)  # where one is not required
    convert(source, tmp_path / "with", Format.RECURRENTGEMMA, tokenizer=tmp_path / "pieces")
    assert (tmp_path / "with/tokenizer.model").read_bytes() == (tmp_path / "pieces").read_bytes()


def test_a_tokenizer_of_another_size(make, refused) -> None:
    from cases import make_config

    source = make("source", Format.HUGGINGFACE, make_config("RRA", vocab_size=2047))
    refused(source, errors.TokenizerError, "has 2048 pieces, and the vocabulary 2047 entries")


def test_destinations(tmp_path: Path, make, refused) -> None:
    source = make("source", Format.KAGGLE_TORCH)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    refused(source, errors.DestinationError, "exists")
    assert (out / "precious").exists()
    convert(source, out, Format.HUGGINGFACE, force=True)
    assert not (out / "precious").exists()
    with pytest.raises(errors.DestinationError, match="must not hold the source"):
        convert(source, source, Format.HUGGINGFACE, force=True)
    with pytest.raises(errors.DestinationError, match="the destination is a folder"):
        convert(source, tmp_path / "2b.pt", Format.KAGGLE_TORCH)
    with pytest.raises(errors.DestinationError, match="cannot write"):
        convert(source, source / "model.pt" / "out", Format.KAGGLE_TORCH)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("name", ["source", "s/../source", "around/archive.tar", "around"])
def test_a_source_is_not_replaced(tmp_path: Path, make, name: str) -> None:
    source = make("source", Format.RECURRENTGEMMA)
    (tmp_path / "s").mkdir()
    (tmp_path / "link").symlink_to("source")
    (tmp_path / "around").mkdir()
    archive = shutil.make_archive(str(tmp_path / "around" / "archive"), "tar", source)
    before = files(tmp_path)
    given = [Path(archive)] if "around" in name else [source, tmp_path / "link"]
    for path in given:
        with pytest.raises(errors.DestinationError, match=r"must not (hold|be in) the source"):
            convert(path, tmp_path / name, Format.HUGGINGFACE, force=True)
    assert files(tmp_path) == before


def test_a_destination_in_the_source(make) -> None:
    source = make("source", Format.KAGGLE_FLAX)
    before = files(source)
    with pytest.raises(errors.DestinationError, match="must not be in the source"):
        convert(source, source / "model" / "out", Format.KAGGLE_FLAX)
    assert files(source) == before
    convert(source, source / "out", Format.HUGGINGFACE)  # beside the weights
    assert detect(source / "model")[0] is Format.KAGGLE_FLAX


def test_requests_that_make_no_sense(make, refused) -> None:
    source = make("source", Format.KAGGLE_TORCH)
    for size in (0, "5GB", 1.5):
        refused(source, errors.DestinationError, "must be a positive integer", shard_size=size)
    with pytest.raises(ValueError, match=r"a format must be one of kaggle-flax, .* 'onnx'"):
        convert(source, source.with_name("out"), "onnx")


def test_a_layout_of_another_format(make, refused) -> None:
    source = make("source", Format.KAGGLE_TORCH)
    refused(source, errors.DestinationError, "ocdbt is a layout of kaggle-flax", ocdbt=True)


def test_too_little_disk_is_said_before_starting(make, refused, monkeypatch) -> None:
    source = make("source", Format.KAGGLE_TORCH)
    usage = shutil.disk_usage(source)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr("recurrentgemma_conversion.readers.base.Reader.read", None)
    refused(source, errors.DiskSpaceError, "too little room", "GB are free")
    archive = shutil.make_archive(str(source.with_name("archive")), "gztar", source)
    # Room for its largest file, and not for all.
    size = (source / "model.pt").stat().st_size
    free = usage._replace(free=(16 << 20) + size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr("tarfile.TarFile.extractall", None)
    refused(Path(archive), errors.DiskSpaceError, "too little room")


@pytest.mark.parametrize("to", WRITERS)
def test_a_disk_that_becomes_full(make, refused, monkeypatch, to: Format) -> None:
    def full(file, array, dtype=None) -> None:
        file.write(b"some of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = make("source", Format.KAGGLE_TORCH)
    for module in (tensor_files, kaggle_flax, kaggle_torch):
        monkeypatch.setattr(module, "write_array", full)
    refused(source, errors.DiskSpaceError, "became full", to=to)


def test_a_disk_that_becomes_full_under_a_database(
    tmp_path: Path, make, refused, monkeypatch
) -> None:
    source = make("source", Format.KAGGLE_TORCH)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        refused(
            source, errors.DiskSpaceError, "no file so large", to=Format.KAGGLE_FLAX, ocdbt=True
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("missing", "extra", "kind"),
    [("torch", "torch", "kaggle-torch"), ("tensorstore", "jax", "ocdbt")],
)
def test_extras_that_are_not_installed(
    tmp_path: Path, make, refused, monkeypatch, missing: str, extra: str, kind: str
) -> None:
    if kind == "ocdbt":
        source = write_orbax(tmp_path / "source", ocdbt=True)
    else:
        source = make("source", Format.KAGGLE_TORCH)
    monkeypatch.setitem(sys.modules, missing, None)
    refused(source, errors.MissingExtraError, missing, f"pip install 'recurrentgemma[{extra}]'")


def test_an_extra_that_it_takes_to_verify_is_asked_for_before_writing(
    tmp_path: Path, make, refused, monkeypatch
) -> None:
    source = make("source", Format.KAGGLE_FLAX)
    monkeypatch.setitem(sys.modules, "torch", None)
    steps = []
    refused(
        source,
        errors.MissingExtraError,
        "verifying a .pt file, which can be left out, needs torch",
        to=Format.KAGGLE_TORCH,
        progress=steps.append,
    )
    assert not steps
    convert(source, tmp_path / "out", Format.KAGGLE_TORCH, verify=False)


def test_what_is_written_is_compared(make, refused, monkeypatch) -> None:
    write = ShardsWriter.write

    def careless(self, name: str, tensor) -> None:
        if name in ("final_norm.scale", "blocks.2.attention_block.proj_k.weight"):
            tensor = -tensor
        write(self, name, tensor)

    monkeypatch.setattr(ShardsWriter, "write", careless)
    source = make("source", Format.HUGGINGFACE)
    refused(
        source,
        errors.VerificationError,
        "blocks.2.attention_block.proj_k.kernel, final_norm.scale",
    )


def test_dtypes_that_are_not_written(tmp_path: Path, make) -> None:
    source = make("source", Format.RECURRENTGEMMA)
    with pytest.raises(ValueError, match="one of bfloat16, float16, float32, float64, got int8"):
        convert(source, tmp_path / "out", Format.HUGGINGFACE, dtype="int8")
    assert not (tmp_path / "out").exists()
