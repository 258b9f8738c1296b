"""`recurrentgemma inspect`: its numbers are the layer spec's and the state's."""

import contextlib
import json
import shutil

import pytest

import recurrentgemma_conversion
from recurrentgemma.common.io.arrays import BFLOAT16
from recurrentgemma.common.io.checkpoint import BUNDLED
from recurrentgemma.common.io.shards import WEIGHTS
from recurrentgemma.common.model import presets
from recurrentgemma.common.model.families import config_from_dict, config_from_preset
from recurrentgemma.common.model.layer_spec import layer_spec, num_parameters
from recurrentgemma.common.model.presets import Preset
from recurrentgemma.common.vocabulary import SENTENCEPIECE
from recurrentgemma_conversion.readers.native import NativeReader


def test_json_of_a_checkpoint(cli, checkpoint):
    report = cli("inspect", checkpoint, "--json").json
    config = NativeReader(checkpoint).config
    total = num_parameters(config)
    assert report["checkpoint"] == str(checkpoint)
    assert config_from_dict(report["config"]) == config
    counts = report["num_parameters"]
    assert counts.pop("total") == total == sum(counts.values())
    assert set(counts) == {"embedding", "recurrent_blocks", "attention_blocks", "final_norm"}
    assert counts["embedding"] == config.vocab_size * config.width
    assert counts["final_norm"] == config.width
    assert report["bytes"]["parameters"] == {
        "float32": 4 * total,
        "bfloat16": 2 * total,
        "stored": (checkpoint / WEIGHTS).stat().st_size,
    }
    assert report["parameters"] == [
        {
            "path": spec.path,
            "shape": list(spec.shape),
            "axes": list(spec.axes),
            "dtype": "F32",
            "count": spec.size,
        }
        for spec in layer_spec(config)
    ]


def test_bundled_model(cli, bundled):
    report = cli("inspect", "--json").json
    assert report["checkpoint"] == str(bundled)
    assert report["num_parameters"]["total"] == num_parameters(NativeReader(BUNDLED).config)
    assert cli("inspect").out == cli("inspect", bundled).out


def test_the_tokenizer_is_named_or_said_to_be_missing(cli, checkpoint, tmp_path):
    report = cli("inspect", checkpoint, "--json").json
    assert report["tokenizer"] == str(checkpoint / SENTENCEPIECE)
    assert ["tokenizer", SENTENCEPIECE] in [
        line.split() for line in cli("inspect", checkpoint).out.splitlines()
    ]
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    (bare / SENTENCEPIECE).unlink()
    assert cli("inspect", bare, "--json").json["tokenizer"] is None
    assert "none beside the weights" in cli("inspect", bare).out
    assert "tokenizer" not in cli("inspect", "--preset", "HAWK_PAPER_7B", "--json").json


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_bytes(cli, checkpoint, framework, dtype):
    config = NativeReader(checkpoint).config
    if framework == "torch":
        import torch

        from recurrentgemma.torch import Griffin

        cache = Griffin(config, device="meta", dtype=getattr(torch, dtype)).init_cache(1)
    else:
        import jax.numpy as jnp

        from recurrentgemma.jax import Griffin

        cache = Griffin(config).init_cache(1, jnp.dtype(dtype))
    expected = sum(leaf.nbytes for block in cache.values() for leaf in block if leaf is not None)
    report = cli("inspect", checkpoint, "--json").json
    assert report["bytes"]["state_per_sequence"][dtype] == expected


@pytest.mark.parametrize("preset", Preset)
def test_presets(cli, preset):
    report = cli("inspect", "--preset", preset.name.lower(), "--json").json
    assert report["preset"] == preset.name
    assert report["num_parameters"]["total"] == num_parameters(config_from_preset(preset))
    assert "stored" not in report["bytes"]["parameters"]
    assert {parameter["dtype"] for parameter in report["parameters"]} == {None}
    done = cli("inspect", "--preset", preset.name)
    assert done.code == 0
    assert f"{report['num_parameters']['total']:,}" in done.out
    assert max(map(len, done.out.splitlines())) <= 80


def test_the_published_sizes(cli):
    """2.68B parameters, as Hugging Face counts the 2B model's."""
    report = cli("inspect", "--preset", "RECURRENT_GEMMA_2B_V1", "--json").json
    assert report["num_parameters"]["total"] == 2_682_862_080


def test_what_is_said_of_a_model_overrides(cli, checkpoint, monkeypatch):
    """A preset and single fields, of a checkpoint as `convert` takes them and without one."""
    preset, fields = Preset.HAWK_PAPER_7B, vars(NativeReader(checkpoint).config)
    known = {name: fields[name] for name in preset.config_dict} | {"attention_window_size": 9}
    monkeypatch.setitem(presets._PRESETS, preset, known)
    for source in ((), (checkpoint,)):
        args = ("inspect", *source, "--json", "--preset", preset.name)
        assert cli(*args).json["config"]["attention_window_size"] == 9
        report = cli(*args, "--attention-window-size", "5").json
        assert report["config"]["attention_window_size"] == 5
    assert "stored" in report["bytes"]["parameters"]


def test_table(cli, checkpoint):
    done = cli("inspect", checkpoint)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == str(checkpoint)
    assert "layers                        3: 2 recurrent (R), 1 attention (A)" in lines
    assert any(line.split()[:3] == ["parameter", "(all", "F32)"] for line in lines)
    rows = [line.split() for line in lines]
    assert ["embedder.input_embedding", "2048×32", "vocab", "width", "65,536"] in rows
    # One block of each kind, or every block.
    assert done.out.count("rg_lru.a_param") == 1
    assert "blocks.N (recurrent, 2 of 3)" in lines
    everything = cli("inspect", checkpoint, "--all").out
    assert everything.count("rg_lru.a_param") == 2
    assert [line for line in everything.splitlines() if line.startswith("blocks.")] == [
        "blocks.0 (recurrent)",
        "blocks.1 (recurrent)",
        "blocks.2 (attention)",
    ]
    table = everything[everything.index("parameter (all") : everything.index("\nembedding ")]
    counts = [line.split()[-1].replace(",", "") for line in table.splitlines() if line]
    total = sum(int(count) for count in counts if count.isdigit())
    assert total == num_parameters(NativeReader(checkpoint).config)


def test_mixed_dtypes_have_a_column(cli, checkpoint, monkeypatch):
    def open_checkpoint(*args):
        return contextlib.nullcontext(opened)

    with recurrentgemma_conversion.open_checkpoint(checkpoint) as opened:
        opened.dtypes["final_norm.scale"] = BFLOAT16
    monkeypatch.setattr(recurrentgemma_conversion, "open_checkpoint", open_checkpoint)
    rows = [line.split() for line in cli("inspect").out.splitlines()]
    assert ["parameter", "shape", "axes", "dtype", "count"] in rows
    assert ["final_norm.scale", "32", "width", "BF16", "32"] in rows
    stored = {p["path"]: p["dtype"] for p in json.loads(cli("inspect", "--json").out)["parameters"]}
    assert stored["final_norm.scale"] == "BF16"


def test_a_config_alone_in_either_form(cli, tmp_path):
    """Ours, and Hugging Face's; a model that is not read is named."""
    folder = tmp_path / "folder"
    recurrentgemma_conversion.convert(BUNDLED, folder, "huggingface")
    whole = cli("inspect", BUNDLED, "--json").json["config"]
    for place in (BUNDLED, folder):
        assert cli("inspect", place / "config.json", "--json").json["config"] == whole
    (tmp_path / "other.json").write_text('{"model_type": "llama"}')
    done = cli("inspect", tmp_path / "other.json")
    assert done.code == 2
    assert "llama" in done.err


def test_a_mesh(cli):
    """How the parameters lie on it, what a device holds, what a step sends."""
    options = ("inspect", "--preset", "RECURRENT_GEMMA_2B_V1", "--mesh", "fsdp=4,tensor=2")
    report = cli(*options, "--memory", "--traffic", "64,2048", "--json").json
    (table, *_) = report["parameters"]
    assert table["split"] == ["tensor", "fsdp"]
    assert table["device_count"] == table["count"] // 8
    kept = sum(parameter["device_count"] for parameter in report["parameters"])
    assert report["bytes"]["parameters_a_device"]["float32"] == 4 * kept
    assert report["bytes"]["training"]["float32"]["adamw"]["total"] == 4 * 4 * kept
    sent = report["bytes"]["sent_a_step"]["bfloat16"]
    assert sent["all"] == sum(sent.values()) - sent["all"]
    done = cli(*options, "--traffic", "64,2048")
    assert "a device sends, a step" in done.out
    assert max(map(len, done.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mesh", "fsdp"), "needs the size of every axis here, as fsdp=4, got 'fsdp'"),
        (("--mesh", "tensor=3"), "tensor=3 must divide"),
        (("--traffic", "8,8"), "needs ROWS,TOKENS and --mesh"),
        (("--mesh", "data=2", "--traffic", "8"), "needs ROWS,TOKENS and --mesh"),
    ],
)
def test_meshes_that_do_not_fit(cli, options, message):
    done = cli("inspect", *options)
    assert done.code == 2
    assert message in done.err


def test_blocks_of_a_gguf_that_stay(cli, tmp_path):
    """Matrices in Q4_0 are `q4_32`; a line says how many there are and how to keep them."""
    write_gguf = pytest.importorskip("gguf_files", reason="gguf is not installed").write_gguf
    others = {"token_embd": "F16", "blk.0.ffn_down": "Q8_0"}
    path = write_gguf(tmp_path / "model.gguf", "Q4_0", others=others)
    report = cli("inspect", path, "--json").json
    dtypes = {parameter["path"]: parameter["dtype"] for parameter in report["parameters"]}
    assert report["quantization"] is None
    assert dtypes["embedder.input_embedding"] == "F16"
    assert dtypes["blocks.0.mlp_block.ffw_down.kernel"] == "BF16"
    assert dtypes["blocks.1.mlp_block.ffw_down.kernel"] == "q4_32"
    line = "quantised              11 matrices in Q4_0, which --quantize q4_32 keeps"
    assert line in cli("inspect", path).out.splitlines()
