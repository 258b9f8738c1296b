"""`recurrentgemma parity`."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import make_config
from checkpoints import CONFIGS, parameters, write_checkpoint

from recurrentgemma.common.io.checkpoint import read_config
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma_conversion import Format

pytest.importorskip("flax.linen", reason="jax is not installed")
pytest.importorskip("torch.nn", reason="torch is not installed")

CONFIG = make_config("RRA", vocab_size=2048)
SHORT = ("--greedy", "4", "--length", "24")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Checkpoints: one, the same in another format, one with a moved weight, another model."""
    root = tmp_path_factory.mktemp("parity")
    write_checkpoint(root / "one", Format.RECURRENTGEMMA, CONFIG)
    write_checkpoint(root / "same", Format.HUGGINGFACE, CONFIG)
    name = "blocks.1.mlp_block.ffw_down.bias"
    moved = parameters(CONFIG, "float32")[name].copy()
    moved[3] += 1e-3
    write_checkpoint(root / "moved", Format.RECURRENTGEMMA, CONFIG, changes={name: moved})
    write_checkpoint(root / "other", Format.RECURRENTGEMMA, CONFIGS["attention_last"])
    return root


def test_the_table_fits_80_columns(cli, folders: Path) -> None:
    done = cli("parity", folders / "one", "--gradients", *SHORT)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "one in jax against one in torch, float32"
    legend = dict(re.findall(r"^(max, RMS|\w+)  +(.*)$", done.out.partition("tensor  ")[0], re.M))
    assert legend["float32"] == "the part of what is allowed in float32: 4 times the rounding error"
    assert legend["float64"].endswith("in float64: 1e-10 of the largest value")
    columns = re.split("  +", next(line for line in lines if line.startswith("tensor  ")))
    assert columns == ["tensor", "max", "RMS", *list(legend)[1:]]
    # Both look up the same rows: what does not differ takes no part of what is allowed.
    row = next(line for line in lines if line.startswith("embedder  "))
    assert row.split() == ["embedder", "0", "0", "0", "0%", "0%"]
    assert lines[-1] == "within the budget"
    starts = {line.split("  ")[0] for line in lines}
    for name in ("embedder", "blocks.2.attention_block", "blocks.2.mlp_block", "logits"):
        assert name in starts
    assert {"state of blocks.2", "gradient of embedder", "gradient of blocks.2"} <= starts
    assert "greedy continuations agree for 4 to 4 of 4 tokens" in lines


def test_two_formats_of_one_model(cli, folders: Path) -> None:
    for framework in ("jax", "torch"):
        sides = ("--framework", framework, "--against", framework)
        report = cli("parity", folders / "one", folders / "same", *sides, *SHORT, "--json").json
        assert report["within_budget"] is True
        assert max(tensor["max"] for tensor in report["tensors"]) == 0
        assert report["one"]["implementation"] == framework


def test_a_moved_weight_is_found(cli, folders: Path) -> None:
    done = cli("parity", folders / "one", folders / "moved", *SHORT)
    assert done.code == 1
    lines = done.out.splitlines()
    assert lines[-1].startswith("beyond the budget, first in blocks.1.mlp_block")
    total = len(layer_spec(CONFIG))
    assert f"1 of {total} parameters differ, first blocks.1.mlp_block.ffw_down.bias" in lines
    assert next(line.split("  ")[0] for line in lines if "BEYOND" in line) == "blocks.1.mlp_block"
    report = cli("parity", folders / "one", folders / "moved", *SHORT, "--json")
    assert report.code == 1
    assert json.loads(report.out)["first_beyond"]["name"] == "blocks.1.mlp_block.ffw_down.bias"


def test_nan_is_null_in_json(cli, tmp_path: Path) -> None:
    bad = np.full(24, np.nan, np.float32)
    path = write_checkpoint(
        tmp_path / "nan", Format.RECURRENTGEMMA, CONFIG, changes={"final_norm.scale": bad}
    )
    done = cli("parity", path, *SHORT, "--json")
    assert done.code == 1, done.err
    report = json.loads(done.out, parse_constant=pytest.fail)
    assert report["kl_divergence"] is None


def test_transformers(cli, folders: Path) -> None:
    pytest.importorskip("transformers")
    report = cli(
        "parity", folders / "one", "--against", "transformers", "--gradients", *SHORT, "--json"
    ).json
    assert report["within_budget"] is True
    assert report["greedy_agreement"] == [4] * 4
    kinds = {tensor["kind"] for tensor in report["tensors"]}
    assert kinds == {"parameter", "activation", "gradient"}  # their states have another layout


@pytest.mark.filterwarnings("ignore")  # of transformers, which loads a folder by itself
def test_a_folder_as_it_is_stored(cli, folders: Path, tmp_path: Path) -> None:
    """One key fewer past the window, unless the config says the window of transformers."""
    pytest.importorskip("transformers")
    for options, within in (((), True), (("--window-as-published",), False)):
        folder = tmp_path / f"within {within}"
        assert cli("convert", folders / "one", folder, "--to", "huggingface", *options).code == 0
        sides = (folders / "one", folder, "--against", "transformers", "--as-stored")
        done = cli("parity", *sides, *SHORT, "--json")
        assert done.code == (0 if within else 1), done.err
        report = json.loads(done.out)
        assert (report["within_budget"], report["notes"]) == (within, [])
    folder = tmp_path / "within False"
    given = cli("parity", folder, "--against", "transformers", *SHORT)
    assert given.code == 0
    assert "attention_window_size is 9 for transformers" in given.out
    said = ("--to", "recurrentgemma", "--trained-in-transformers")
    assert cli("convert", folder, tmp_path / "narrow", *said).code == 0
    config: Any = read_config(tmp_path / "narrow" / "config.json")
    assert config.attention_window_size == 7
    for bad, message in (
        (("--as-stored",), "goes with --against transformers, got torch"),
        (("--as-stored", "--against", "transformers"), "must be a huggingface folder"),
    ):
        done = cli("parity", folders / "one", *bad)
        assert done.code == 2
        assert message in done.err


def test_a_text(cli, folders: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "text").write_text("In the beginning")
    monkeypatch.setenv("HOME", str(tmp_path))
    done = cli("parity", folders / "one", "--text=~/text", *SHORT)
    assert done.code == 0, done.err
    (tmp_path / "text").write_bytes(b"\xff")
    done = cli("parity", folders / "one", "--text", tmp_path / "text", *SHORT)
    assert done.code == 2
    assert "must be UTF-8 text" in done.err


def test_a_plot(cli, folders: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = cli("parity", folders / "one", *SHORT, "--plot", tmp_path / "plot.png")
    assert done.code == 0, done.err
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    done = cli("parity", folders / "one", "--plot", tmp_path / "plot.xyz")
    assert done.code == 2
    assert "must be one of" in done.err
    assert not (tmp_path / "plot.xyz").exists()


def test_bad_input(cli, folders: Path, monkeypatch) -> None:
    done = cli("parity", folders / "one", folders / "other")
    assert done.code == 2
    for field in ("width: 24 | 40", "block_types: RRA | RA", "logits_soft_cap: 5.0 | 0.0"):
        assert field in done.err
    assert "scan_type" not in done.err
    done = cli("parity", folders / "missing")
    assert done.code == 2
    assert "no checkpoint folder" in done.err
    done = cli("parity", "--against", "transformers", "--dtype", "float64")
    assert done.code == 2
    assert "its recurrence is float32" in done.err
    done = cli("parity", "--framework", "transformers")
    assert done.code == 2
    for name, extra in (("torch", "torch"), ("flax", "jax"), ("matplotlib", "train")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            done = cli("parity", "--plot", "plot.png")
            assert done.code == 2
            assert f"pip install 'recurrentgemma[{extra}]'" in done.err
            assert done.err.count("\n") == 1
