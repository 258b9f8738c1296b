"""Where a config comes from, and how often headers are read."""

import dataclasses
import io

import pytest
from checkpoints import CONFIGS

from recurrentgemma.common.errors import ConfigError
from recurrentgemma.common.io import tensor_files
from recurrentgemma.common.io.checkpoint import BUNDLED, BUNDLED_CHAT, checkpoint_path
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.presets import Preset
from recurrentgemma_conversion import Format, Overrides, convert, open_checkpoint
from recurrentgemma_conversion.formats import Tensor
from recurrentgemma_conversion.names import layout
from recurrentgemma_conversion.names.griffin import resolve
from recurrentgemma_conversion.opening import load_tokenizer, open_headers

PRESET = GriffinConfig.from_preset(Preset.HAWK_PAPER_7B)
STATED = dataclasses.replace(PRESET, attention_window_size=7, logits_soft_cap=8.0)


def test_who_wins_for_each_field_of_a_config() -> None:
    """Overrides, then the preset, the stated config, the shapes, the preset with these shapes."""
    shapes = layout(PRESET, Format.KAGGLE_TORCH).shapes
    tensors = {name: Tensor(shape, None) for name, shape in shapes.items()}
    assert resolve(tensors, None, Overrides()) == PRESET
    assert resolve(tensors, STATED, Overrides()) == STATED
    named = Overrides(Preset.HAWK_PAPER_7B)
    assert resolve(tensors, None, named) == PRESET
    assert resolve(tensors, STATED, named) == PRESET
    for stated in (None, STATED):
        both = resolve(tensors, stated, named._replace(attention_window_size=9))
        assert both == dataclasses.replace(PRESET, attention_window_size=9)
    with pytest.raises(ValueError, match="this is not RECURRENT_GEMMA_9B_V1: num_heads is 32"):
        resolve(tensors, None, Overrides(Preset.RECURRENT_GEMMA_9B_V1))
    smaller = {n: t for n, t in tensors.items() if not n.startswith("blocks.31.")}
    with pytest.raises(ValueError, match="shapes do not tell embeddings_scale_by_sqrt_dim, "):
        resolve(smaller, None, Overrides())
    assert resolve(smaller, None, Overrides(None, True, 9, 5.0)).num_layers == 31


@pytest.mark.parametrize("format_", [Format.HUGGINGFACE, Format.RECURRENTGEMMA])
def test_a_header_is_parsed_once(make, monkeypatch, format_: Format) -> None:
    source, read = make("source", format_), []
    parse = tensor_files._read_header
    monkeypatch.setattr(
        tensor_files, "_read_header", lambda path: (read.append(path), parse(path))[1]
    )
    with open_checkpoint(source) as reader:
        assert reader.config == CONFIGS["griffin"]
    assert read == [source / "model.safetensors"]


@pytest.mark.parametrize(
    "format_", [Format.HUGGINGFACE, Format.RECURRENTGEMMA, Format.KAGGLE_TORCH, Format.KAGGLE_FLAX]
)
def test_a_config_is_read_once(make, monkeypatch, format_: Format) -> None:
    if format_ is Format.KAGGLE_TORCH:
        pytest.importorskip("torch.nn", reason="torch is not installed")
    source, opened, open_ = make("source", format_), [], io.open

    def counting(file, mode="r", *args, **kwargs):
        if "b" not in mode:  # the first bytes of any file may tell a format
            opened.append(file)
        return open_(file, mode, *args, **kwargs)

    monkeypatch.setattr(io, "open", counting)  # which paths call
    with open_checkpoint(source) as reader:
        assert reader.config == CONFIGS["griffin"]
    assert opened.count(source / "config.json") == 1


def test_a_pickle_is_parsed_once(make, monkeypatch) -> None:
    torch = pytest.importorskip("torch")
    source, loaded, load = make("source", Format.KAGGLE_TORCH), [], torch.load
    monkeypatch.setattr(torch, "load", lambda f, **kw: (loaded.append(f), load(f, **kw))[1])
    with open_checkpoint(source) as reader:
        assert reader.config == CONFIGS["griffin"]
    assert len(loaded) == 1


@pytest.mark.parametrize("format_", [Format.KAGGLE_FLAX, Format.KAGGLE_TORCH])
def test_parameters_and_tokenizer_without_a_config(make, format_: Format) -> None:
    if format_ is Format.KAGGLE_TORCH:
        pytest.importorskip("torch.nn", reason="torch is not installed")
    source = make("source", format_)
    (source / "config.json").unlink()
    config = CONFIGS["griffin"]
    with open_headers(source) as reader:
        assert list(reader.dtypes) == [spec.path for spec in layout(config, format_).specs]
        assert {value.shape for _, value in reader} == {s.shape for s in reader.specs}
        with pytest.raises(ConfigError, match="shapes do not tell"):
            _ = reader.config
    assert load_tokenizer(source).size == config.vocab_size


def test_short_names_of_the_bundled_models(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checkpoint_path() == BUNDLED
    for name, bundled in {"tiny": BUNDLED, "tiny-chat": BUNDLED_CHAT}.items():
        assert checkpoint_path(name) == bundled
        with open_checkpoint(name) as opened:
            assert opened.path == bundled
        assert load_tokenizer(name).size == 2048
    convert("tiny-chat", "tiny", Format.RECURRENTGEMMA)
    with open_checkpoint("tiny") as opened:  # a folder of that name comes first
        assert opened.path.samefile(tmp_path / "tiny")
