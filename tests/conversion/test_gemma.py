"""Gemma 1, 2 and 3 in every published layout: `shared/golden/gemma_formats`, if it is there."""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import make_params
from safetensors.numpy import load_file, save_file

from recurrentgemma.common import errors
from recurrentgemma.common.model.families import config_from_preset
from recurrentgemma.common.model.gemma import GemmaConfig
from recurrentgemma.common.model.layer_spec import layer_spec, num_parameters
from recurrentgemma.common.model.presets import Preset
from recurrentgemma_conversion import Format, Overrides, Reader, convert, detect, open_checkpoint
from recurrentgemma_conversion.convert import WRITERS
from recurrentgemma_conversion.formats import Tensor
from recurrentgemma_conversion.names import FAMILIES, layout, other_parts
from recurrentgemma_conversion.names.gemma import GEMMA
from recurrentgemma_conversion.opening import open_headers

MODELS = ["gemma1_mqa", "gemma1_mha", "gemma2", "gemma3_mqa", "gemma3_gqa"]
LAYOUTS = ["kaggle_flat", "gm_nested", "gemma_pytorch.ckpt", "model.gguf"]
PUBLISHED = {  # parameters, as transformers counts them
    "GEMMA_2B": 2_506_172_416,
    "GEMMA_7B": 8_537_680_896,
    "GEMMA2_2B": 2_614_341_888,
    "GEMMA2_9B": 9_241_705_984,
    "GEMMA2_27B": 27_227_128_320,
    "GEMMA3_270M": 268_098_176,
    "GEMMA3_1B": 999_885_952,
    "GEMMA3_4B": 3_880_263_168,
    "GEMMA3_12B": 11_766_034_176,
    "GEMMA3_27B": 27_009_346_304,
}
SMALL = GemmaConfig.from_sizes(3, 512, 48, 64, 7, 4, 2, 12, sliding_window=6)


def parameters(reader: Reader) -> dict[str, np.ndarray]:
    return {spec.path: np.asarray(reader.read(spec)) for spec in reader.specs}


def assert_same(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)
        assert actual[path].dtype == value.dtype


@pytest.fixture
def copied(golden: Path, tmp_path: Path):
    """A published layout in a folder of its own."""

    def copy(model: str, name: str) -> Path:
        source, target = golden / "gemma_formats" / model / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        return target

    return copy


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    config = config_from_preset(name)
    assert isinstance(config, GemmaConfig)
    assert num_parameters(config) == PUBLISHED[name]
    assert GemmaConfig.from_dict(json.loads(config.to_json())) == config


def test_codegemma_has_the_shapes_of_gemma() -> None:
    assert config_from_preset("CODEGEMMA_7B") == config_from_preset(Preset.GEMMA_7B)
    assert {p.name for p in Preset if p.name.startswith("GEMMA")} == set(PUBLISHED)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_holds_the_same_bits(golden: Path, copied, model: str, name: str) -> None:
    """llama.cpp's norms are stored with a one that is added: rounding takes their last bits."""
    with open_checkpoint(golden / "gemma" / model) as reader:
        assert reader.format is Format.HUGGINGFACE
        config, expected = reader.config, parameters(reader)
    with open_headers(copied(model, name)) as reader:  # no config is needed for names and axes
        assert reader.format in (Format.KAGGLE_FLAX, Format.KAGGLE_TORCH, Format.GGUF)
        assert reader.left_out == []
        actual = parameters(reader)
    if name == "model.gguf":
        for path in expected:
            if path.endswith("scale"):
                np.testing.assert_allclose(actual[path], expected[path], rtol=0, atol=2.4e-7)
                actual[path] = expected[path]
    assert_same(actual, expected)
    assert isinstance(config, GemmaConfig)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", LAYOUTS[:3])
def test_a_config_of_ours_beside_a_layout(golden: Path, copied, model: str, name: str) -> None:
    with open_checkpoint(golden / "gemma" / model) as reader:
        config = reader.config
    assert isinstance(config, GemmaConfig)
    source = copied(model, name)
    with pytest.raises(errors.ConfigError, match="have the shapes of no published Gemma"):
        convert(source, source.parent / "out", Format.HUGGINGFACE)
    (source.parent / "config.json").write_text(config.to_json())
    done = convert(source, source.parent / "out", Format.HUGGINGFACE)
    assert done.verified
    stored = load_file(source.parent / "out" / "model.safetensors")
    assert_same(stored, load_file(golden / "gemma" / model / "model.safetensors"))
    written = json.loads((source.parent / "out/config.json").read_text())
    published = json.loads((golden / "gemma" / model / "config.json").read_text())
    left = {"transformers_version", "initializer_range", "_sliding_window_pattern"}
    left |= {"use_bidirectional_attention", "max_position_embeddings"}
    assert {name: written.get(name) for name in published.keys() - left} == {
        name: value for name, value in published.items() if name not in left
    }


@pytest.mark.parametrize("model", MODELS)
def test_the_config_of_a_gguf(golden: Path, model: str) -> None:
    """The query scale of 27B is known by its number of layers, and this small one has seven."""
    with open_checkpoint(golden / "gemma" / model) as reader:
        config = reader.config
    with open_checkpoint(golden / "gemma_formats" / model / "model.gguf") as reader:
        scalar = {"query_pre_attn_scalar": 12.0} if model == "gemma3_gqa" else {}
        assert isinstance(reader.config, GemmaConfig)
        assert dataclasses.replace(reader.config, **scalar) == config
        assert reader.load_tokenizer().size == config.vocab_size


@pytest.mark.parametrize("model", MODELS)
def test_round_trips_through_every_format(golden: Path, tmp_path: Path, model: str) -> None:
    source = golden / "gemma" / model
    with open_checkpoint(source) as reader:
        config, expected = reader.config, parameters(reader)
    for i, format_ in enumerate([*WRITERS, Format.HUGGINGFACE]):
        if format_ is Format.RECURRENTGEMMA:
            continue  # it needs a tokenizer
        target = tmp_path / f"{i}"
        assert convert(source, target, format_).verified
        assert detect(target)[0] is format_
        with open_checkpoint(target) as reader:
            assert reader.config == config
            assert_same(parameters(reader), expected)
        source = target


@pytest.mark.parametrize("version", [1, 2, 3])
def test_what_is_written_for_kaggle(tmp_path: Path, version: int) -> None:
    """Gemma 1 has halves of [D, F], the later ones of [F, D]; equal heads are one tensor."""
    config = GemmaConfig.from_sizes(version, 64, 20, 28, 2, 4, 4, 6, sliding_window=5)
    shapes = layout(config, Format.KAGGLE_FLAX).shapes
    layer = "transformer/layer_1"
    halves = (2, 20, 28) if version == 1 else (2, 28, 20)
    assert shapes[f"{layer}/mlp/gating_einsum.w"] == halves
    assert shapes[f"{layer}/attn/qkv_einsum.w"] == (3, 4, 20, 6)
    fewer = dataclasses.replace(config, num_kv_heads=2)
    shapes = layout(fewer, Format.KAGGLE_FLAX).shapes
    assert shapes[f"{layer}/attn/kv_einsum.w"] == (2, 2, 20, 6)
    assert shapes[f"{layer}/attn/q_einsum.w"] == (4, 20, 6)
    fused = layout(fewer, Format.KAGGLE_TORCH).shapes["model.layers.1.self_attn.qkv_proj.weight"]
    assert fused == (48, 20)
    small = config_from_preset("GEMMA2_2B")
    shapes = layout(small, Format.KAGGLE_FLAX).shapes
    assert shapes["transformer/layer_0/mlp/gating_einsum.w"] == (2, 2304, 9216)


@pytest.mark.parametrize("preset", PUBLISHED)
@pytest.mark.parametrize("format_", [Format.KAGGLE_FLAX, Format.KAGGLE_TORCH])
def test_a_published_size_is_known_by_its_shapes(preset: str, format_: Format) -> None:
    """Its vocabulary has as many rows as the table: 128 more than elsewhere, in Kaggle's."""
    config = config_from_preset(preset, 256_128)
    assert isinstance(config, GemmaConfig)
    shapes = layout(config, format_).shapes
    tensors = {name: Tensor(shape, np.dtype("float32")) for name, shape in shapes.items()}
    assert GEMMA.resolve(tensors, None, Overrides()) == config
    assert GEMMA.resolve(tensors, None, Overrides(preset=Preset[preset])) == config
    other = Overrides(preset=Preset.RECURRENT_GEMMA_2B_V1)
    with pytest.raises(ValueError, match="this is not RECURRENT_GEMMA_2B_V1"):
        GEMMA.resolve(tensors, None, other)
    window = Overrides(attention_window_size=7)
    if config.sliding_window is not None:
        assert GEMMA.resolve(tensors, None, window).sliding_window == 8


@pytest.mark.parametrize("nested", [False, True])
def test_layers_that_are_stacked(tmp_path: Path, nested: bool) -> None:
    """Seven layers in a pattern of six: the first kind holds two of them, the others one."""
    checkpoint = pytest.importorskip("orbax.checkpoint")
    params = {path: value.astype(np.float32) for path, value in make_params(SMALL).items()}
    apart: dict[str, list[np.ndarray]] = {}
    for name, tensor in layout(SMALL, Format.KAGGLE_FLAX).encode(lambda spec: params[spec.path]):
        place = re.sub(
            r"layer_(\d+)", lambda n: f"stacked_layers/attention_type_{int(n[1]) % 6}", name
        )
        apart.setdefault(place, []).append(np.asarray(tensor))
    tree: dict[str, Any] = {}
    for place, tensors in apart.items():
        value = np.stack(tensors) if "stacked" in place else tensors[0]
        keys = place.rsplit(".", 1)
        if nested:
            keys = re.split("[/.]", place.removeprefix("transformer/"))
            keys = keys[:-1] if "mlp" in keys else keys
        level = tree
        for key in keys[:-1]:
            level = level.setdefault(key, {})
        level[keys[-1]] = value
    checkpoint.PyTreeCheckpointer(use_ocdbt=nested).save(tmp_path / "source/model", tree)
    (tmp_path / "source/config.json").write_text(SMALL.to_json())
    with open_checkpoint(tmp_path / "source") as reader:
        assert_same(parameters(reader), params)


# ------------------------------------------------------------------------- Hugging Face's config


def test_configs_as_published_before_transformers_5() -> None:
    """Gemma 3 4B states little, and its decoder inside; the rest are the library's defaults."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    fields = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    assert GEMMA.from_fields(Path("x"), fields) == config_from_preset("GEMMA3_4B")
    large = text | {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
    }
    fields = {"model_type": "gemma3", "text_config": large}
    assert GEMMA.from_fields(Path("x"), fields) == config_from_preset("GEMMA3_27B")
    old = {
        "model_type": "gemma",
        "hidden_act": "gelu",
        "head_dim": 256,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
    }
    assert GEMMA.from_fields(Path("x"), old) == config_from_preset("GEMMA_2B")
    two = old | {
        "model_type": "gemma2",
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 144,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    assert GEMMA.from_fields(Path("x"), two) == config_from_preset("GEMMA2_27B")


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_fields_read_back(preset: str) -> None:
    config = config_from_preset(preset)
    assert GEMMA.from_fields(Path("x"), GEMMA.to_fields(config, "float32")) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps must be 1e-06, got 1e-05"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention must be False"),
        ({"hidden_activation": "relu"}, "hidden_activation must be 'gelu_pytorch_tanh'"),
        ({"layer_types": ["full_attention"]}, "layer_types must have 7 entries, got 1"),
        ({"layer_types": ["chunked"] * 7}, "'chunked' is no AttentionType"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be from 1 to 10000, got None"),
        ({"num_key_value_heads": 3}, "num_heads must be divisible by num_kv_heads"),
        ({"sliding_window": 1}, "sliding_window must be an integer of at least 2, got 1"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_type must be 'default', or 'linear' in Gemma 3, got 'yarn'",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 5e3}}},
            "the rope of sliding layers must have rope_theta 10000",
        ),
    ],
)
def test_fields_that_the_model_does_not_have(changes: dict, message: str) -> None:
    fields = GEMMA.to_fields(SMALL, "float32") | changes
    with pytest.raises(errors.ConfigError, match=re.escape(message)):
        GEMMA.from_fields(Path("config.json"), fields)


def test_a_missing_field() -> None:
    fields = GEMMA.to_fields(SMALL, "float32")
    del fields["hidden_size"]
    with pytest.raises(errors.ConfigError, match="lacks 'hidden_size'"):
        GEMMA.from_fields(Path("config.json"), fields)


# ------------------------------------------------------------------- models that also see, others


def write_seeing(folder: Path, prefix: str) -> dict[str, np.ndarray]:
    """A checkpoint of a model that also sees; the parameters of its decoder."""
    params = {path: value.astype(np.float32) for path, value in make_params(SMALL).items()}
    stored = {
        name.replace("model.", prefix, 1): np.ascontiguousarray(tensor)
        for name, tensor in layout(SMALL, Format.HUGGINGFACE).encode(lambda s: params[s.path])
    }
    head = {"lm_head.weight": stored[f"{prefix}embed_tokens.weight"]}
    eyes = {
        "vision_tower.vision_model.post_layernorm.weight": np.zeros(3, np.float32),
        "multi_modal_projector.mm_input_projection_weight": np.zeros((2, 3), np.float32),
    }
    folder.mkdir()
    save_file(stored | eyes | head, folder / "model.safetensors")
    text = GEMMA.to_fields(SMALL, "float32")
    fields = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    (folder / "config.json").write_text(json.dumps(fields))
    return params


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_is_taken_and_the_rest_named(tmp_path: Path, prefix: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    expected = write_seeing(source, prefix)
    with open_checkpoint(source) as reader:
        assert reader.config == SMALL
        assert_same(parameters(reader), expected)
    done = convert(source, target, Format.HUGGINGFACE)
    assert done.left_out == [
        "multi_modal_projector.mm_input_projection_weight",
        "vision_tower.vision_model.post_layernorm.weight",
    ]
    assert json.loads((target / "config.json").read_text())["model_type"] == "gemma3_text"
    assert "model.embed_tokens.weight" in load_file(target / "model.safetensors")
    with pytest.raises(errors.MismatchError, match=r"vision_tower\.vision_model"):
        convert(source, tmp_path / "strict", Format.HUGGINGFACE, strict=True)
    assert not (tmp_path / "strict").exists()


def test_other_parts_in_every_format() -> None:
    """As the published 4B has them."""
    seeing = [
        "model.vision_tower.vision_model.embeddings.position_embedding.weight",
        "model.multi_modal_projector.mm_soft_emb_norm.weight",
        "SigLiPFromPatches_0/siglip_encoder/embedding.kernel",
        "transformer/embedder.mm_output_embedding",
        "transformer/embedder/mm_input_projection.w",
        "vision_encoder.siglip_encoder.Transformer.encoder_norm.bias",
        "siglip_vision_model.encoder_blocks.0.mlp.fc1.weight",
        "mm_soft_embedding_norm.weight",
    ]
    computed = ["local_freqs_cis", "global_freqs_cis"]
    decoder = [
        name
        for format_ in (*WRITERS, Format.GGUF)
        for name in layout(SMALL, format_).shapes
    ]  # fmt: skip
    assert other_parts([*decoder, *seeing, *computed]) == (seeing, computed)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gemma3n", "Gemma 3n"),
        ("gemma3n_text", "Gemma 3n"),
        ("gemma4", "Gemma 4"),
        ("gemma4_text", "Gemma 4"),
        ("paligemma", "PaliGemma"),
        ("t5gemma", "T5Gemma"),
        ("t5gemma2", "T5Gemma"),
        ("vaultgemma", "VaultGemma"),
    ],
)
def test_other_models_are_named(tmp_path: Path, kind: str, name: str) -> None:
    write_seeing(tmp_path / "source", "model.")
    (tmp_path / "source/config.json").write_text(json.dumps({"model_type": kind}))
    words = f"holds {name}, which is not read: model_type must be one of 'recurrent_gemma', 'gemma'"
    with (
        pytest.raises(errors.OtherModelError, match=f"{words}.*got '{kind}'"),
        open_checkpoint(tmp_path / "source"),
    ):
        pass


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        ("model.language_model.layers.0.laurel.linear_left.weight", "Gemma 3n"),
        ("model.language_model.layers.0.layer_scalar", "Gemma 4"),
        ("transformer/layer_0.skip_scale", "Gemma 4"),
        ("multi_modal_projector.linear.weight", "PaliGemma"),
        ("decoder.layers.0.cross_attn.k_proj.weight", "T5Gemma"),
    ],
)
def test_other_models_are_named_by_their_tensors(tmp_path: Path, tensor: str, name: str) -> None:
    save_file({tensor: np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with (
        pytest.raises(errors.OtherModelError, match=f"holds {name}, which is not read: it has"),
        open_checkpoint(tmp_path),
    ):
        pass


def test_every_family_says_what_it_reads() -> None:
    kinds = [kind for family in FAMILIES for kind in family.model_types]
    assert len(set(kinds)) == len(kinds) == 5
    assert list(layout(SMALL, Format.GGUF).pieces) == [spec.path for spec in layer_spec(SMALL)]
