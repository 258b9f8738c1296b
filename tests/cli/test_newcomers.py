"""What newcomers type: names of sites, folders of runs, tokenizers, control tokens."""

import shutil

import pytest

from recurrentgemma.common.io.checkpoint import BUNDLED
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma_conversion.readers.huggingface_tokenizer import write_tokenizer_files


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("google/recurrentgemma-2b-it", "hf:google/recurrentgemma-2b-it"),
        ("hf:google/gemma-3-270m", "hf:google/gemma-3-270m"),
        ("kaggle:google/gemma/flax/2b", "kaggle:google/gemma/flax/2b"),
    ],
)
def test_a_name_on_a_site_gives_the_download_command(cli, name, command):
    done = cli("inspect", name)
    assert done.code == 2
    assert done.err.endswith(f": recurrentgemma download {command}\n")


def test_inspect_takes_its_checkpoint_as_other_commands_do(cli):
    assert (
        cli("inspect", "--checkpoint", BUNDLED, "--json").json
        == cli("inspect", BUNDLED, "--json").json
    )


def test_a_tokenizer_json_in_place_of_the_checkpoints(cli, tmp_path):
    pytest.importorskip("torch.nn")
    bare = shutil.copytree(BUNDLED, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    write_tokenizer_files(tmp_path, Tokenizer(BUNDLED))
    (tmp_path / "text").write_text("In the beginning")
    given = ("--checkpoint", bare, "--tokenizer", tmp_path / "tokenizer.json")
    options = ("--framework", "torch", "--json")
    sampled = cli("sample", "It was", "--max-new-tokens", "3", *options, *given).json
    assert (
        sampled["text"] == cli("sample", "It was", "--max-new-tokens", "3", *options).json["text"]
    )
    scored = cli("score", tmp_path / "text", *options, *given).json
    assert scored["tokens"] == cli("score", tmp_path / "text", *options).json["tokens"]


def test_float16_runs(cli):
    pytest.importorskip("torch.nn")
    args = ("sample", "It was", "--framework", "torch", "--max-new-tokens", "2", "--json")
    assert cli(*args, "--dtype", "float16").json["dtype"] == "float16"
