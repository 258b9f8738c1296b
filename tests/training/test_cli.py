"""`recurrentgemma train`: its outputs, options and error messages."""

import dataclasses
import importlib.util
import json
import re
import tomllib
from typing import Any

import numpy as np
import pytest

from recurrentgemma.cli import main
from recurrentgemma.cli.train_display import Terminal
from recurrentgemma.cli.train_options import FIELDS, TrainOptions, read_toml, to_toml
from recurrentgemma.common.io.checkpoint import BUNDLED, read_config
from recurrentgemma.common.io.files import held_folder
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec, num_parameters
from recurrentgemma.common.model.state_dict import torch_name
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma.common.training.adapters import ADAPTERS, read_adapters
from recurrentgemma.common.training.logs import read_log
from recurrentgemma_conversion.readers.native import NativeReader

LOGGED = {"step", "epoch", "read", "loss", "tokens", "grad_norm", "learning_rate",
          "tokens_per_second", "seconds"}  # fmt: skip


def test_what_a_run_leaves(corpus, framework, train, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboardX")
    done = train(framework, steps=8, sample_tokens=4, plot=None, tensorboard=True)
    run = corpus / "run"
    assert done.code == 0, done.err
    assert done.out.startswith(f"{run}/model: 8 steps in ")
    size = num_parameters(read_config(corpus / "config.json"))
    assert f"\ntraining {size:,} of {size:,} parameters (100.00%)\n" in done.err
    assert "step 8/8: loss " in done.err
    assert "step 3: validation loss " in done.err
    steps = read_log(run / "train_log.jsonl")
    assert [entry["step"] for entry in steps] == list(range(1, 9))
    assert all(set(entry) == LOGGED for entry in steps)
    evaluations = read_log(run / "validation_log.jsonl")
    assert [entry["step"] for entry in evaluations] == [0, 3, 6, 8]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    assert evaluations[-1]["perplexity"] == pytest.approx(np.exp(evaluations[-1]["loss"]))
    prompts = [sample["prompt"] for sample in evaluations[0]["samples"]]
    first = json.loads((corpus / "valid.jsonl").read_text().splitlines()[0])["text"]
    assert first.startswith(prompts[0] + " ")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())
    assert len(list((run / "checkpoints").iterdir())) in (2, 3)
    # The other commands read each of them as a checkpoint.
    folders = [run / "model", run / "best", *(run / "checkpoints").iterdir()]
    for folder in folders:
        assert NativeReader(folder).config.width == 16
    for command in (
        ["sample", "the", "--checkpoint", run / "best", "--max-new-tokens", 2],
        ["inspect", run / "model"],
        ["convert", run / "model", corpus / "hf", "--to", "huggingface"],
    ):
        assert main(list(map(str, command))) == 0
    capsys.readouterr()


def test_both_frameworks_learn_the_same(corpus, both_frameworks, train, losses):
    """100 steps of AdamW from the same weights and data."""
    options = {"steps": 100, "evaluate_every": 25, "checkpoint_every": 100, "log_every": 100}
    for framework in ("jax", "torch"):
        assert train(framework, out=corpus / framework, **options).code == 0
    for log in ("train", "validation"):
        jax, torch = (np.array(losses(log, out=name)) for name in ("jax", "torch"))
        np.testing.assert_allclose(jax, torch, rtol=1e-4)
        assert torch[-1, 1] < 0.6 * torch[0, 1]


def test_flags_win_over_the_file(corpus, train):
    options = corpus / "options.toml"
    options.write_text(
        'optimizer = "sgd"\nlearning-rate = 1\nlength = 12\npack = false\n'
        f'validation = "{corpus / "valid.jsonl"}"\nsample_prompt = ["a \\"b\\"", "é"]\n'
    )
    done = train(options=options, validation=None, steps=2, learning_rate=None, length=None,
                 batch_size=3)  # fmt: skip
    assert done.code == 0, done.err
    written = tomllib.loads((corpus / "run" / "run.toml").read_text())
    expected = {"optimizer": "sgd", "learning_rate": 1.0, "length": 12, "pack": False,
                "batch_size": 3, "steps": 2, "framework": "torch", "dtype": "float32",
                "sample_prompt": ['a "b"', "é"]}  # fmt: skip
    assert expected.items() <= written.items()
    files = [corpus / "train.jsonl", corpus / "valid.jsonl"]
    assert train(options=options, train=files, length=20, steps=2, out=corpus / "other").code == 0
    written = tomllib.loads((corpus / "other" / "run.toml").read_text())
    assert (written["length"], written["pack"]) == (20, False)
    assert written["train"] == list(map(str, files))
    # A flag also wins over the options that it excludes.
    options.write_text("epochs = 7\nvalidation_share = 0.5\n")
    assert train(options=options, steps=2, out=corpus / "third").code == 0
    written = tomllib.loads((corpus / "third" / "run.toml").read_text())
    assert "epochs" not in written
    assert "validation_share" not in written
    # The options file of a run repeats the run.
    path = corpus / "run" / "run.toml"
    again = main(["train", "--options", str(path), "--out", str(corpus / "again")])
    assert again == 0
    one, other = ((corpus / run / "model" / "model.safetensors") for run in ("run", "again"))
    assert one.read_bytes() == other.read_bytes()


def test_paths_from_home(corpus, train, monkeypatch):
    """No shell expands `~` in a file or after an equals sign."""
    monkeypatch.setenv("HOME", str(corpus))
    monkeypatch.chdir(corpus)
    (corpus / "options.toml").write_text('train = ["~/train.jsonl"]\nout = "~/in-the-file"\n')
    for flag, out in ((None, "in-the-file"), ("~/run", "run")):
        done = train(options="~/options.toml", train=None, out=flag, steps=1)
        assert done.code == 0, done.err
        written = tomllib.loads((corpus / out / "run.toml").read_text())
        assert written["out"] == str(corpus / out)
        assert written["train"] == [str(corpus / "train.jsonl")]
    assert not (corpus / "~").exists()


def test_every_option_is_written_and_read(tmp_path):
    values = {}
    for field in dataclasses.fields(TrainOptions):
        default = getattr(TrainOptions(train=[]), field.name)
        values[field.name] = default
    options = TrainOptions(**values)
    path = tmp_path / "run.toml"
    path.write_text(to_toml(options, {'a "b".jsonl': "00"}))
    read, files = read_toml(path)
    assert TrainOptions(**read) == options
    assert files == {'a "b".jsonl': "00"}
    assert set(read) <= set(FIELDS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("length = ", "is not TOML"),
        ("lenght = 3\nstep = 2", "unknown option 'lenght'; unknown option 'step'"),
        ("batch-size = 1\nbatch_size = 2", "batch_size is given twice"),
        ("length = 1.5", "length must be of type int, got 1.5"),
        ("length = true", "length must be of type int, got True"),
        ('framework = "numpy"', "'numpy' is not a valid Framework"),
        ("train = [1]", "train must be of type str, got 1"),
    ],
)
def test_mistakes_in_the_file(corpus, train, text, words):
    (corpus / "options.toml").write_text(text)
    done = train(options=corpus / "options.toml")
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": None}, "--train must name a JSONL file"),
        ({"out": None}, "--out must name the folder"),
        ({"train": "/nowhere.jsonl"}, "/nowhere.jsonl: No such file"),
        ({"validation_share": 0.1}, "--validation and --validation-share exclude each other"),
        ({"epochs": 2}, "--steps and --epochs exclude each other"),
        ({"preset": "HAWK_PAPER_7B"}, "--preset and --config exclude each other"),
        ({"config": None, "preset": "GPT"}, "'GPT' is no Preset"),
        ({"config": None, "checkpoint": "/nowhere"}, "no checkpoint folder at /nowhere"),
        ({"tokenizer": "/nowhere"}, "no tokenizer at /nowhere"),
        ({"too_long": "wrap"}, "'wrap' is no TooLong; choose from SPLIT, TRUNCATE, SKIP"),
        ({"stride": 17}, "stride from 1 to length"),
        ({"optimizer": "lion"}, "must be one of adamw, sgd, adafactor, got 'lion'"),
        ({"learning_rate": -1}, "learning_rate must be positive, got -1.0"),
        ({"warmup_steps": 6}, "total_steps must be more than warmup_steps"),
        ({"lora_rank": 2, "lora_target": "norms"}, "targets must be some of"),
        ({"steps": None, "epochs": 0}, "--epochs must be above 0"),
        ({"resume": True, "force": True}, "--resume and --force exclude each other"),
        ({"framework": "numpy"}, "--framework"),
        ({"length": 0}, "--length"),
    ],
)
def test_mistakes(corpus, train, changes, words):
    pytest.importorskip("torch.nn")
    framework = changes.pop("framework", "torch")
    done = train(framework, **changes)
    assert (done.code, done.out) == (2, "")
    assert words in done.err.splitlines()[-1]
    assert not (corpus / "run").exists()


def test_bad_data(corpus, train):
    pytest.importorskip("torch.nn")
    with (corpus / "train.jsonl").open("a") as file:
        file.write('{"text": "x"\n{"text": 1}\n')
    done = train()
    assert done.code == 2
    assert "train.jsonl, line 101: not JSON: Expecting ',' delimiter, column" in done.err
    assert "line 102: 'text' must be a string, got int" in done.err
    (corpus / "train.jsonl").write_text("")
    assert "train.jsonl holds no examples" in train().err
    (corpus / "train.jsonl").write_text('{"prompt": "the of and to in", "completion": "that"}\n')
    done = train(length=4, too_long="truncate")
    assert "no example has anything to predict within 4 tokens" in done.err
    assert not (corpus / "run").exists()


def test_adapters_go_on_only_on_their_base(corpus, base, train):
    pytest.importorskip("torch.nn")
    options = {"config": None, "checkpoint": base, "lora_rank": 2, "steps": 1}
    assert train(**options).code == 0
    weights = base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = train(resume=True, **options)
    assert done.code == 2
    assert f"these inputs have changed: {weights}" in done.err


@pytest.mark.parametrize(("how", "word"), [("truncate", "truncated"), ("skip", "skipped")])
def test_examples_that_are_too_long_are_counted(train, how, word):
    pytest.importorskip("torch.nn")
    done = train(too_long=how, steps=1)
    assert done.code == 0
    assert re.search(rf"rows of 16; \d+ longer examples were {word}\n", done.err)


def test_a_tokenizer_that_is_not_the_model_s(corpus, train):
    pytest.importorskip("torch.nn")
    bundled: Any = NativeReader(BUNDLED).config
    config = dataclasses.replace(bundled, vocab_size=2000)
    (corpus / "other.json").write_text(config.to_json())
    done = train(config=corpus / "other.json")
    assert "the tokenizer has 2048 pieces, the model a vocabulary of 2000" in done.err
    proto = Tokenizer(BUNDLED / "tokenizer.model").vocab.serialized_model_proto()
    word = b"\xe2\x96\x81shall"
    assert proto.count(word + b"\x15") == 1
    (corpus / "swapped.model").write_bytes(
        proto.replace(word + b"\x15", "▁SHALL".encode() + b"\x15")
    )
    done = train(config=None, tokenizer=corpus / "swapped.model")
    assert "the tokenizer differs from the checkpoint" in done.err
    assert done.code == 2


def test_a_run_is_never_replaced_unasked(corpus, train):
    pytest.importorskip("torch.nn")
    assert train(steps=1).code == 0
    before = (corpus / "run" / "run.toml").read_bytes()
    done = train(steps=2)
    assert (done.code, done.out) == (2, "")
    assert "holds a training run: --resume continues it, --force replaces it" in done.err
    # It stays if the new run cannot begin.
    assert train(force=True, train="/nowhere").code == 2
    assert (corpus / "run" / "run.toml").read_bytes() == before
    assert train(force=True, steps=2).code == 0
    assert len(read_log(corpus / "run" / "train_log.jsonl")) == 2


def test_a_run_has_one_writer(corpus, train):
    pytest.importorskip("torch.nn")
    with held_folder(corpus / "run"):
        for how in ({}, {"resume": True}):
            done = train(**how)
            assert (done.code, done.out) == (2, "")
            assert done.err == (
                f"recurrentgemma: error: another process is writing {corpus / 'run'}\n"
            )
    # A mistake leaves no folder behind.
    (corpus / "run").rmdir()
    assert train(train="/nowhere").code == 2
    assert not (corpus / "run").exists()


def test_what_a_resumed_run_must_have_as_it_was(corpus, train):
    pytest.importorskip("torch.nn")
    assert train().code == 0
    done = train(resume=True, length=20, learning_rate=0.5, keep=1)
    assert done.code == 2
    assert "length was 16, is 20; learning_rate was 0.01, is 0.5" in done.err
    assert "keep" not in done.err
    # Options that are not given stay; those that do not affect the weights may change.
    out = str(corpus / "run")
    assert main(["train", "--resume", "--out", out, "--keep", "1"]) == 0
    assert read_toml(corpus / "run" / "run.toml")[0]["keep"] == 1
    with (corpus / "valid.jsonl").open("a") as file:
        file.write('{"text": "and more"}\n')
    done = train(resume=True)
    assert done.code == 2
    assert f"these inputs have changed: {corpus / 'valid.jsonl'}" in done.err


def test_adapters_are_beside_what_they_are_merged_into(corpus, base, framework, train):
    done = train(framework, config=None, checkpoint=base, lora_rank=2, steps=2)
    assert done.code == 0, done.err
    run = corpus / "run"
    before, after = NativeReader(base), NativeReader(run / "model")
    for spec in layer_spec(before.config):
        one, other = (folder.shards.read(torch_name(spec.path)) for folder in (before, after))
        changed = not np.array_equal(one.astype(np.float32), other.astype(np.float32))
        assert changed == (spec.lora in ("attention", "recurrent", "mlp")), spec.path
    last = run / "checkpoints" / "step-0000002" / "training" / ADAPTERS
    assert last.read_bytes() == (run / ADAPTERS).read_bytes()
    trained = sum(array.size for array in read_adapters(run, before.config).arrays.values())
    total = num_parameters(before.config) + trained
    assert f"training {trained:,} of {total:,} parameters ({trained / total:.2%})\n" in done.err
    args = ["merge", base, run, corpus / "merged", "--dtype", "float32"]
    assert main(list(map(str, args))) == 0
    again = NativeReader(corpus / "merged")
    for name in after.shards.tensors:
        one, other = (folder.shards.read(name) for folder in (after, again))
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_no_number(corpus, train):
    pytest.importorskip("torch.nn")
    done = train(optimizer="sgd", learning_rate=1e30, clip_norm=0, steps=20, log_every=1)
    assert done.code == 2
    assert re.search(r"the (loss|grad_norm) is (nan|inf) at step \d+; the", done.err)
    assert "Traceback" not in done.err


def test_a_loss_that_is_no_number_is_skipped(corpus, train, losses):
    pytest.importorskip("torch.nn")
    options = {"optimizer": "sgd", "learning_rate": 1e30, "clip_norm": 0, "log_every": 1}
    done = train(steps=4, on_nonfinite="skip", validation=None, **options)
    assert done.code == 0, done.err
    assert re.search(r"step \d skipped: the (loss|grad_norm) is (nan|inf)", done.err)
    assert [step for step, _ in losses()] == [1, 2, 3, 4]


def test_float16_is_not_trained_in(train):
    done = train(dtype="float16")
    assert done.code == 2
    assert "float16 cannot be trained in" in done.err


def test_samples_show_new_lines_as_such(capsys):
    samples = [
        {"prompt": "In the\n", "text": "beginning\n\nwas"},
        {"prompt": "Emma", "text": " was"},
    ]
    with Terminal(8, 0, lambda: None) as terminal:
        terminal.validated({"step": 3, "loss": 1.0, "perplexity": 2.7, "samples": samples})
    lines = capsys.readouterr().err.splitlines()[1:]
    assert [line.rstrip() for line in lines] == [
        "  1  In the", "     beginning", "", "     was", "  2  Emma was"]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "package"), [({"plot": True}, "matplotlib"), ({"tensorboard": True}, "tensorboardX")]
)
def test_an_absent_extra_is_named(train, monkeypatch, option, package):
    pytest.importorskip("torch.nn")
    find_spec = importlib.util.find_spec
    absent = lambda name, *rest: None if name == package else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    done = train(**option)
    assert done.code == 2
    assert done.err.endswith(
        f"needs {package}, which is not installed: pip install 'recurrentgemma[train]'\n"
    )
    # Without a request, the plot is left out.
    assert train(plot=None, steps=1).code == 0


def test_a_preset_gets_the_tokenizer_s_vocabulary(train, monkeypatch, corpus):
    pytest.importorskip("torch.nn")
    made = []
    monkeypatch.setattr(
        "recurrentgemma.common.training.trainer.Trainer",
        lambda framework, setup: made.append(setup) or pytest.skip.Exception,
    )
    with pytest.raises(AttributeError):
        train(config=None, preset="recurrent_gemma_2b_v1")
    assert made[0].config == GriffinConfig.from_preset("RECURRENT_GEMMA_2B_V1", 2048)
