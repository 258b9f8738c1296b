"""Names and levels that PyTorch's wrappers and trainers put around a model's parameters."""

import dataclasses
import importlib
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CONFIGS, write_checkpoint
from safetensors.numpy import load_file, save_file

from backends import BACKENDS
from recurrentgemma.common.errors import (
    ConfigError,
    DamagedError,
    MismatchError,
    UnsafePickleError,
)
from recurrentgemma.common.io.shards import WEIGHTS, unwrapped
from recurrentgemma_conversion import Format, convert, open_checkpoint
from recurrentgemma_conversion.overrides import Overrides

CONFIG = CONFIGS["griffin"]
WRAPPERS = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "parallel": lambda name: f"module.{name}",
    "compiled and parallel": lambda name: f"module._orig_mod.{name}",
    "an attribute": lambda name: f"net.{name}",
    "compiled blocks": lambda name: re.sub(
        r"^((?:model\.)?(?:blocks|layers)\.\d+\.)", r"\1_orig_mod.", name
    ),
}
LEVELS = [("state_dict",), ("model",), ("model_state_dict",), ("state_dict", "model")]


def same(one: Path, other: Path) -> None:
    with open_checkpoint(one) as first, open_checkpoint(other) as second:
        assert first.config == second.config
        for (spec, value), (_, expected) in zip(first, second, strict=True):
            assert value.tobytes() == expected.tobytes(), spec.path


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("format_", [Format.HUGGINGFACE, Format.RECURRENTGEMMA])
def test_safetensors(tmp_path: Path, wrap, format_: Format) -> None:
    plain = write_checkpoint(tmp_path / "plain", format_, CONFIG)
    wrapped = write_checkpoint(tmp_path / "wrapped", format_, CONFIG)
    file = wrapped / "model.safetensors"
    tensors = load_file(file)
    save_file({wrap(name): value for name, value in tensors.items()}, file)
    same(wrapped, plain)
    convert(wrapped, tmp_path / "again", format_)
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_state_dicts(tmp_path: Path, wrap, levels: tuple[str, ...]) -> None:
    torch = pytest.importorskip("torch")
    plain = write_checkpoint(tmp_path / "plain", Format.KAGGLE_TORCH, CONFIG)
    wrapped = write_checkpoint(tmp_path / "wrapped", Format.KAGGLE_TORCH, CONFIG)
    (file,) = wrapped.glob("*.pt")
    state = {wrap(name): value for name, value in torch.load(file).items()}
    for level in levels:
        state = {level: state, "epoch": 3}
    torch.save(state, file)
    same(wrapped, plain)


def test_names_that_are_no_wrappers_stay() -> None:
    for names in (
        ["model.embed_tokens.weight", "model.layers.0.x"],
        ["embedder.input_embedding", "blocks.0.x", "final_norm.scale"],
        ["language_model.model.layers.0.x", "language_model.model.norm.weight"],
        ["blocks.0.x"],
        ["x"],
        [],
    ):
        assert unwrapped(names) == {name: name for name in names}


def shards(folder: Path, state: dict) -> None:
    """A state dict in two files with an index, as older versions of `transformers` write it."""
    torch = pytest.importorskip("torch")
    names = sorted(state)
    parts = {"1": names[::2], "2": names[1::2]}
    files = {i: f"pytorch_model-0000{i}-of-00002.bin" for i in parts}
    for i, part in parts.items():
        torch.save({name: state[name] for name in part}, folder / files[i])
    places = {name: files[i] for i, part in parts.items() for name in part}
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def one_file(folder: Path, state: dict) -> None:
    """`pytorch_model.bin`, with the tied output matrix."""
    torch = pytest.importorskip("torch")
    tied = {"lm_head.weight": state["model.embed_tokens.weight"]}
    torch.save(state | tied, folder / "pytorch_model.bin")


def lightning(folder: Path, state: dict) -> None:
    """What Lightning's `ModelCheckpoint` writes."""
    torch = pytest.importorskip("torch")
    state = {f"model.{name}": value for name, value in state.items()}
    (folder / "checkpoints").mkdir()
    (folder / "hparams.yaml").write_text("lr: 0.1\n")
    checkpoint = {
        "epoch": 1,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}],
    }
    torch.save(checkpoint, folder / "checkpoints" / "epoch=1-step=3.ckpt")


def accelerate(folder: Path, state: dict) -> None:
    """What `Accelerator.save_state` writes, with `safe_serialization` off."""
    torch = pytest.importorskip("torch")
    one_file(folder, state)
    torch.save({"state": {0: torch.ones(3)}}, folder / "optimizer.bin")
    torch.save({"last_epoch": 3}, folder / "scheduler.bin")
    (folder / "random_states_0.pkl").write_bytes(pickle.dumps({"step": 3}))


def accelerate_safetensors(folder: Path, state: dict) -> None:
    """What `Accelerator.save_state` writes by default."""
    accelerate(folder, state)
    (folder / "pytorch_model.bin").unlink()
    save_torch_file(state, folder / "model.safetensors")


def bare(folder: Path, state: dict) -> None:
    save_torch_file(state, folder / "weights.safetensors")


def save_torch_file(state: dict, file: Path) -> None:
    save_file({name: value.numpy() for name, value in state.items()}, file)


@pytest.mark.parametrize("with_config", [True, False], ids=["config", "no config"])
@pytest.mark.parametrize(
    "write", [one_file, shards, lightning, accelerate, accelerate_safetensors, bare]
)
def test_folders_of_other_programs(tmp_path: Path, write: Any, with_config: bool) -> None:
    """Hugging Face's names in what trainers write; the config beside them, or given in Python."""
    torch = pytest.importorskip("torch")
    plain = write_checkpoint(tmp_path / "plain", Format.HUGGINGFACE, CONFIG)
    state = {name: torch.from_numpy(value) for name, value in load_file(plain / WEIGHTS).items()}
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, state)
    weights = next((file for file in folder.rglob("*") if file.suffix == ".ckpt"), folder / "x")
    if with_config:
        shutil.copy(plain / "config.json", weights.parent / "config.json")
        same(folder, plain)
        return
    without = r"lacks config.json: .* give load_checkpoint a config"
    with pytest.raises(ConfigError, match=without), open_checkpoint(folder):
        pass
    overrides = Overrides(config=CONFIG)
    with open_checkpoint(folder, overrides) as checkpoint, open_checkpoint(plain) as expected:
        assert checkpoint.config == CONFIG
        for (spec, value), (_, other) in zip(checkpoint, expected, strict=True):
            assert value.tobytes() == other.tobytes(), spec.path
    wrong = Overrides(config=dataclasses.replace(CONFIG, width=2 * CONFIG.width))
    with pytest.raises(MismatchError, match=str(CONFIG.width)), open_checkpoint(folder, wrong):
        pass


@pytest.mark.parametrize("twin", BACKENDS)
def test_a_config_in_python(tmp_path: Path, twin: str) -> None:
    """A file of our own names, too; the config given wins over the one beside the weights."""
    load = importlib.import_module(f"recurrentgemma.{twin}").load_checkpoint
    plain = write_checkpoint(tmp_path / "plain", Format.RECURRENTGEMMA, CONFIG)
    file = shutil.copy(plain / WEIGHTS, tmp_path / "alone.safetensors")
    other = dataclasses.replace(CONFIG, logits_soft_cap=7.0)
    for path in (file, plain):
        loaded = load(path, config=other)
        assert (loaded[0] if twin == "jax" else loaded).config == other
    with pytest.raises(ValueError, match=r"lacks config\.json"):
        load(file)


def test_what_only_a_trusted_pickle_may_hold(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    file = tmp_path / "epoch=0.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"path": tmp_path}}, file)
    refused = pytest.raises(UnsafePickleError, match=r"could run code.*save its tensors alone")
    with refused, open_checkpoint(file, Overrides(config=CONFIG)):
        pass


def test_files_that_an_index_promises(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    shards(tmp_path, {name: torch.ones(2) for name in ("model.embed_tokens.weight", "b", "c")})
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    lacks = pytest.raises(DamagedError, match=r"lacks pytorch_model-00002-of-00002.bin")
    with lacks, open_checkpoint(tmp_path, Overrides(config=CONFIG)):
        pass
