"""`--adapter`: a checkpoint with adapters says what the merged checkpoint says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recurrentgemma.common.io.checkpoint import BUNDLED
from recurrentgemma.common.training.adapters import ADAPTERS, Adapters, write_adapters
from recurrentgemma.common.training.lora import LoraOptions, trainable_specs
from recurrentgemma_conversion import open_checkpoint
from recurrentgemma_conversion.peft import write_peft


@pytest.fixture(scope="module")
def folders(tmp_path_factory, checkpoint) -> dict[str, Path]:
    """Adapters in our file, in PEFT's layout, and merged."""
    from recurrentgemma.cli import main

    folder = tmp_path_factory.mktemp("adapters")
    with open_checkpoint(checkpoint) as opened:
        config = opened.config
    options, rng = LoraOptions(rank=2), np.random.default_rng(0)
    arrays = {
        spec.path: (rng.standard_normal(spec.shape) / 3).astype(np.float32)
        for spec in trainable_specs(config, options)
    }
    adapters = Adapters(config, options, arrays)
    write_adapters(folder / ADAPTERS, adapters)
    write_peft(folder / "peft", adapters)
    assert main(["merge", str(checkpoint), str(folder), str(folder / "merged")]) == 0
    return {
        "base": checkpoint,
        "ours": folder,
        "peft": folder / "peft",
        "merged": folder / "merged",
    }


def test_scores(cli, folders, tmp_path: Path, framework: str) -> None:
    text = tmp_path / "text"
    text.write_text("In the beginning")

    def logprobs(*words: Any) -> list[float]:
        return cli("score", text, "--framework", framework, "--json", *words).json["logprobs"]

    merged = logprobs("--checkpoint", folders["merged"])
    for kind in ("ours", "peft"):
        with_it = logprobs("--checkpoint", folders["base"], "--adapter", folders[kind])
        np.testing.assert_array_equal(with_it, merged)
    assert np.abs(np.subtract(merged, logprobs("--checkpoint", folders["base"]))).max() > 0.1


def test_samples_and_chats(cli, folders, tmp_path: Path) -> None:
    pytest.importorskip("torch.nn")
    common = ("--framework", "torch", "--max-new-tokens", "6")
    merged = ("--checkpoint", folders["merged"])
    adapted = ("--checkpoint", folders["base"], "--adapter", folders["peft"])
    texts = [cli("sample", "In", "--json", *common, *words).json["text"]
             for words in (merged, adapted)]  # fmt: skip
    assert texts[0] == texts[1]
    answers = [cli("chat", *common, *words, stdin=b"In the\n") for words in (merged, adapted)]
    assert answers[0].out == answers[1].out != ""
    # A batch is not continued with other adapters.
    lines, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines.write_text('"In"\n')
    batch = ("sample", "--input", lines, "--output", results, *common)
    assert cli(*batch, *adapted).code == 0
    lines.write_text('"In"\n"At"\n')
    done = cli(*batch, *adapted[:-1], folders["ours"])
    assert done.code == 2
    assert "adapter" in done.err


def test_parity(cli, folders) -> None:
    """A with adapters is the merged B; without B both sides have them."""
    pytest.importorskip("torch.nn")
    options = ("--framework", "torch", "--against", "torch", "--length", "20", "--greedy", "2")
    options += ("--json", "--adapter", folders["ours"])
    report = cli("parity", folders["base"], folders["merged"], *options).json
    assert report["one"]["adapter"] == str(folders["ours"])
    assert "adapter" not in report["other"]
    both = cli("parity", folders["base"], *options).json
    assert both["one"] == both["other"]
    apart = cli("parity", folders["base"], folders["base"], *options)
    assert apart.code == 1
    assert json.loads(apart.out)["one"]["adapter"] == str(folders["ours"])


def test_mistakes(cli, folders) -> None:
    """The message says what is wrong; the exit code is 2."""
    pytest.importorskip("torch.nn")
    said = ("sample", "In", "--framework", "torch", "--adapter")
    for path, message in (
        (BUNDLED, "no adapters at"),
        (folders["base"] / "nothing", "no adapters at"),
        (folders["ours"], "adapters of another model: width is 32, the model has"),
        (folders["peft"], "adapters that are not the model's"),
    ):
        done = cli(*said, path)
        assert done.code == 2
        assert message in done.err
    done = cli("parity", "--against", "transformers", "--as-stored", "--adapter", folders["ours"])
    assert done.code == 2
    assert "--adapter is added to what recurrentgemma reads" in done.err
