"""`recurrentgemma convert`, and `inspect` of every format."""

import json
import re
import shutil
import sys
from typing import Any

import numpy as np
import pytest
from checkpoints import CONFIGS, files, write_checkpoint

from recurrentgemma.cli.convert import FORMATS, parse_size
from recurrentgemma.common.model.layer_spec import num_parameters
from recurrentgemma_conversion import Format, open_checkpoint
from recurrentgemma_conversion.convert import WRITERS
from recurrentgemma_conversion.opening import READERS

CONFIG = CONFIGS["griffin"]

pytestmark = pytest.mark.usefixtures("both_frameworks")


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "source", Format.KAGGLE_TORCH, CONFIG, "bfloat16")


def test_formats_are_all_there():
    assert tuple(WRITERS) == FORMATS


def test_a_line(cli, tmp_path, source):
    before = files(source)
    done = cli("convert", source, tmp_path / "out", "--to", "huggingface")
    assert done.code == 0
    assert re.fullmatch(r"attention_window_size is 9 for transformers, .* it is 8\n", done.err)
    assert done.out.count("\n") == 1
    for words in (str(tmp_path / "out"), "kaggle-torch to huggingface", "MB/s", ", verified"):
        assert words in done.out
    assert files(source) == before
    assert not list(tmp_path.glob(".*"))
    done = cli("convert", source, tmp_path / "out", "--to", "recurrentgemma")
    assert (done.code, done.out) == (2, "")
    assert "exists; pass --force to replace it" in done.err
    done = cli("convert", source, tmp_path / "out", "--to", "recurrentgemma", "--force")
    assert done.code == 0
    with open_checkpoint(tmp_path / "out") as reader:
        assert reader.format is Format.RECURRENTGEMMA


def test_json(cli, tmp_path, source):
    done = cli("convert", source, tmp_path / "out", "--to", "kaggle-flax", "--dtype", "float32",
               "--no-verify", "--json")  # fmt: skip
    report = done.json
    assert report.pop("seconds") > 0
    assert report == {
        "source": str(source),
        "destination": str(tmp_path / "out"),
        "source_format": "kaggle-torch",
        "format": "kaggle-flax",
        "tensors": 89,
        "values": num_parameters(CONFIG),
        "bytes": 4 * num_parameters(CONFIG),
        "dtypes": ["float32"],
        "verified": False,
        "nonfinite": {},
        "left_out": [],
        "notes": [],
    }


def test_shards_and_given_config(cli, tmp_path, source):
    (source / "config.json").unlink()
    (source / "tokenizer.model").rename(tmp_path / "pieces")
    args = ("convert", source, tmp_path / "out", "--to", "recurrentgemma", "--shard-size", "50KB")
    assert "tokenizer" not in cli(*args).err  # it says first what the shapes do not
    args += ("--attention-window-size", "7", "--logits-soft-cap", "2.5")
    args += ("--no-embeddings-scale-by-sqrt-dim",)
    assert "no tokenizer.model or tokenizer.json beside" in cli(*args).err
    assert cli(*args, "--tokenizer", tmp_path / "pieces").code == 0
    with open_checkpoint(tmp_path / "out") as reader:
        config: Any = reader.config
    assert (config.attention_window_size, config.logits_soft_cap) == (7, 2.5)
    assert not config.embeddings_scale_by_sqrt_dim
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_a_folder_of_ours_without_a_tokenizer(cli, tmp_path, source):
    bare, out = tmp_path / "bare", tmp_path / "out"
    assert cli("convert", source, bare, "--to", "recurrentgemma").code == 0
    (bare / "tokenizer.model").unlink()
    done = cli("convert", bare, out, "--to", "recurrentgemma")
    assert done.code == 2
    assert "no tokenizer.model or tokenizer.json beside" in done.err
    assert "--tokenizer" in done.err
    pieces = ("--tokenizer", source / "tokenizer.model")
    assert cli("convert", bare, out, "--to", "recurrentgemma", *pieces).code == 0
    assert (out / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert cli("convert", bare, tmp_path / "torch", "--to", "kaggle-torch").code == 0
    assert not (tmp_path / "torch/tokenizer.model").exists()
    (tmp_path / "text").write_text("a")
    for command in (("sample", "a"), ("chat",), ("score", tmp_path / "text")):
        done = cli(*command, "--checkpoint", bare)
        assert done.code == 2
        assert f"no tokenizer.model or tokenizer.json beside the weights in {bare}: put" in done.err
        assert done.err.count("\n") == 1


def test_nonfinite(cli, tmp_path):
    bad = np.full(24, np.nan, np.float32)
    source = write_checkpoint(
        tmp_path / "source", Format.HUGGINGFACE, changes={"final_norm.scale": bad}
    )
    args = ("convert", source, tmp_path / "out", "--to", "kaggle-torch")
    done = cli(*args)
    assert done.code == 2
    assert "--allow-nonfinite keeps them): final_norm.scale: 24 values" in done.err
    assert cli(*args, "--allow-nonfinite", "--json").json["nonfinite"] == {"final_norm.scale": 24}


def test_mistakes(cli, tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    done = cli("convert", source, out, "--to", "gguf")
    assert done.code == 2
    assert all(name in done.err for name in FORMATS)
    commands = ("convert", source, out, "--to", "recurrentgemma"), ("inspect", source)
    for args in commands:
        done = cli(*args, "--preset", "HAWK_PAPER_7B")
        assert "this is not HAWK_PAPER_7B: width is 24 in the checkpoint and 4096" in done.err
    monkeypatch.setitem(sys.modules, "torch", None)
    for args in commands:
        done = cli(*args)
        assert done.code == 2
        assert done.err.endswith(
            "torch, which is not installed: pip install 'recurrentgemma[torch]'\n"
        )
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8), ("7", 7), ("2k", 2000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GB", "0", "-1", "1.2.3", "5TB", "five", "0.0001", "9" * 400],
    ids=lambda text: text[:9],
)
def test_no_sizes(text):
    with pytest.raises(ValueError, match="a size must be a number of bytes"):
        parse_size(text)


def test_progress_is_shown_in_a_terminal(cli, tmp_path, source, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    import rich.progress

    seen = []
    monkeypatch.setattr(
        rich.progress.Progress, "update", lambda self, task, **fields: seen.append((task, fields))
    )
    done = cli("convert", source, tmp_path / "out", "--to", "huggingface")
    assert done.code == 0
    total = 2 * num_parameters(CONFIG)
    assert len(seen) == 2 * 90
    for task in (0, 1):
        steps = [fields for number, fields in seen if number == task]
        assert steps[0] == {"completed": 0, "tensors": "0/89"}
        assert steps[-1] == {"completed": total, "tensors": "89/89"}


@pytest.mark.parametrize("format_", WRITERS)
def test_inspect_of_every_format(cli, tmp_path, format_, monkeypatch):
    source = write_checkpoint(tmp_path / "model", format_, CONFIG, "bfloat16")
    # No weights are read.
    monkeypatch.setattr("recurrentgemma_conversion.readers.base.Reader.read", None)
    for reader in READERS.values():
        monkeypatch.setattr(reader, "fetch", None)
    report = cli("inspect", source, "--json").json
    assert report["format"] == format_
    assert report["config"] == CONFIG.to_dict()
    assert {parameter["dtype"] for parameter in report["parameters"]} == {"BF16"}
    assert report["bytes"]["parameters"]["stored"] >= 2 * num_parameters(CONFIG)
    assert "blocks.N (recurrent, 4 of 5)" in cli("inspect", source).out


def test_inspect_with_what_the_shapes_do_not_tell(cli, source):
    (source / "config.json").unlink()
    done = cli("inspect", source)
    assert done.code == 2
    assert "shapes do not tell" in done.err
    said = ("--attention-window-size", "8", "--logits-soft-cap", "5")
    report = cli("inspect", source, "--json", *said, "--embeddings-scale-by-sqrt-dim").json
    assert report["config"] == CONFIG.to_dict()


def test_inspect_with_a_window_that_no_computer_has(cli, source):
    done = cli("inspect", source, "--attention-window-size", "9" * 400)
    assert done.code == 2
    assert "attention_window_size must be below 2**63, got 999" in done.err


def test_inspect_of_an_archive(cli, tmp_path, source):
    shutil.make_archive(str(tmp_path / "archive"), "gztar", source)
    report = cli("inspect", tmp_path / "archive.tar.gz", "--json").json
    assert json.dumps(report["config"]) == json.dumps(CONFIG.to_dict())
    assert report["format"] == "kaggle-torch"
    assert report["tokenizer"] == str(tmp_path / "archive.tar.gz" / "tokenizer.model")
    done = cli("sample", "a", "--checkpoint", tmp_path / "archive.tar.gz", "--max-new-tokens", "1")
    assert done.code == 0
