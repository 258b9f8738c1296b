"""Names and levels that PyTorch's wrappers and trainers put around a model's parameters."""

import re
from pathlib import Path

import pytest
from checkpoints import CONFIGS, write_checkpoint
from safetensors.numpy import load_file, save_file

from recurrentgemma.common.io.shards import unwrapped
from recurrentgemma_conversion import Format, convert, open_checkpoint

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
