"""`recurrentgemma merge`: a base and its adapters in one folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from recurrentgemma.common.io.checkpoint import BUNDLED
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.training.adapters import Adapters, write_adapters
from recurrentgemma.common.training.lora import LoraOptions, merge, trainable_specs
from recurrentgemma_conversion import open_checkpoint
from recurrentgemma_conversion.readers.native import NativeReader


def write(path: Path, options: LoraOptions) -> Adapters:
    """Random adapters of the bundled model."""
    config = NativeReader(BUNDLED).config
    rng = np.random.default_rng(0)
    arrays = {
        spec.path: (rng.standard_normal(spec.shape) / 16).astype(np.float32)
        for spec in trainable_specs(config, options)
    }
    adapters = Adapters(config, options, arrays)
    write_adapters(path, adapters)
    return adapters


@pytest.mark.parametrize("quantize", [False, True])
def test_merges(cli, tmp_path: Path, quantize: bool) -> None:
    """Every parameter of the result is the definition's, in the dtype asked for."""
    file, merged = tmp_path / "adapters.safetensors", tmp_path / "merged"
    adapters = write(file, LoraOptions(rank=2, targets=("mlp", "gates"), quantize=quantize))
    done = cli("merge", BUNDLED, tmp_path, merged, "--dtype", "float32")
    assert done.code == 0, done.err
    assert done.out.strip() == f"{merged}: 20 adapters of rank 2 merged"
    with open_checkpoint(BUNDLED) as base, open_checkpoint(merged) as result:
        assert result.config == base.config
        assert set(result.dtypes.values()) == {np.dtype(np.float32)}
        for spec in layer_spec(base.config):
            expected = merge(spec, base.read(spec), adapters.arrays, adapters.options)
            np.testing.assert_array_equal(result.read(spec), np.float32(expected), spec.path)
    assert (merged / "tokenizer.model").read_bytes() == (BUNDLED / "tokenizer.model").read_bytes()


def test_another_models_tokenizer_is_not_merged_in(cli, tmp_path: Path) -> None:
    write(tmp_path / "adapters.safetensors", LoraOptions(rank=2))
    base = shutil.copytree(BUNDLED, tmp_path / "base")
    (base / "tokenizer.model").unlink()
    pieces = ["<bos>", "<eos>", *map(str, range(2047))]
    larger = models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "0")
    Tokenizer(larger).save(str(base / "tokenizer.json"))
    done = cli("merge", base, tmp_path, tmp_path / "merged")
    assert done.code == 2
    assert "has 2049 pieces, and the vocabulary 2048 entries" in done.err
    assert not (tmp_path / "merged").exists()


def test_writes_for_peft(cli, tmp_path: Path) -> None:
    """The base's name is the one given, or its folder; a note says if transformers has no such."""
    write(tmp_path / "adapters.safetensors", LoraOptions(rank=2))
    exported = tmp_path / "exported"
    assert cli("convert", BUNDLED, exported, "--to", "huggingface").code == 0
    for base, words, name, noted in (
        (BUNDLED, (), str(BUNDLED), True),
        (BUNDLED, ("--base-name", "me/tiny"), "me/tiny", False),
        (exported, (), str(exported), False),
    ):
        done = cli("merge", base, tmp_path, tmp_path / "peft", "--peft", "--force", *words)
        assert done.code == 0, done.err
        assert f"in PEFT's layout, for {name}" in done.out
        assert ("is no checkpoint of transformers" in done.out) == noted
        assert {file.name for file in (tmp_path / "peft").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        assert fields["base_model_name_or_path"] == name


def test_merges_what_peft_wrote(cli, tmp_path: Path) -> None:
    """The adapters come back from PEFT's layout as they went."""
    write(tmp_path / "adapters.safetensors", LoraOptions(rank=2))
    assert cli("merge", BUNDLED, tmp_path, tmp_path / "peft", "--peft").code == 0
    done = cli("merge", BUNDLED, tmp_path / "peft", tmp_path / "two")
    assert done.out.strip() == f"{tmp_path / 'two'}: 32 adapters of rank 2 merged"
    assert cli("merge", BUNDLED, tmp_path, tmp_path / "one").code == 0
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_mistakes(cli, tmp_path: Path) -> None:
    """One line and exit code 2, and nothing is written."""
    file, merged = tmp_path / "adapters.safetensors", tmp_path / "merged"
    write(file, LoraOptions(rank=2, targets=("gates",)))

    def fails(message: str, *words: str | Path) -> None:
        done = cli("merge", *words)
        assert (done.code, done.out) == (2, "")
        assert message in done.err
        assert done.err.count("\n") == 1

    fails("no adapters at", BUNDLED, tmp_path / "nothing", merged)
    fails("adapters of another model: logits_soft_cap is 30.0, the model has 7.0",
          BUNDLED, file, merged, "--logits-soft-cap", "7")  # fmt: skip
    fails("train without the target gates", BUNDLED, file, merged, "--peft")
    fails("--base-name goes with --peft", BUNDLED, file, merged, "--base-name", "me/tiny")
    assert not merged.exists()
    merged.mkdir()
    fails("exists; pass --force", BUNDLED, file, merged)
    file.write_bytes(file.read_bytes()[:-5])
    fails("no complete safetensors file", BUNDLED, file, merged, "--force")
