"""Where a checkpoint is: told by content, whatever the names, links and folders around it."""

import gzip
import os
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CONFIGS, files, write_orbax

from recurrentgemma.common import errors
from recurrentgemma_conversion import Format, Overrides, convert, detect, open_checkpoint
from recurrentgemma_conversion.convert import WRITERS

pytest.importorskip("torch.nn", reason="torch is not installed")
import torch

pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")

CONFIG = CONFIGS["griffin"]
OVERRIDES = Overrides(None, True, 8, 5.0)  # what its shapes do not tell


def test_several_checkpoints_in_a_folder(tmp_path: Path, make, refused) -> None:
    make("both/one", Format.HUGGINGFACE)
    make("both/two", Format.KAGGLE_TORCH)
    refused(tmp_path / "both", errors.UnknownFormatError, "holds several checkpoints", "one", "two")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", errors.UnknownFormatError, "lacks config.json, model.safetensors")
    (tmp_path / "text").write_text("hello")
    refused(tmp_path / "text", errors.UnknownFormatError, "is no Orbax checkpoint")


@pytest.mark.parametrize("format_", WRITERS)
def test_formats_are_told_by_content(tmp_path: Path, make, format_: Format) -> None:
    source = make("source", format_)
    for i, file in enumerate(sorted(source.iterdir())):
        if file.suffix == ".pt" or file.is_dir():
            file.rename(source / f"{i}.bin")
    assert detect(source)[0] is format_
    (tmp_path / "around").mkdir()
    source.rename(tmp_path / "around/anything.pt")
    assert detect(tmp_path / "around")[0] is format_


def test_an_item_of_a_step(make) -> None:
    """As Orbax's checkpoint manager lays it out; the step has metadata of its own."""
    source = make("source", Format.KAGGLE_FLAX)
    (source / "3").mkdir()
    (source / "model").rename(source / "3/default")
    shutil.copy(source / "3/default/_CHECKPOINT_METADATA", source / "3")
    for path in (source, source / "3", source / "3/default"):
        assert detect(path) == (Format.KAGGLE_FLAX, source / "3/default")


@pytest.mark.parametrize("format_", WRITERS)
def test_a_cache_of_links_to_nameless_files(tmp_path: Path, make, refused, format_: Format) -> None:
    """As the hub's library keeps what it downloads."""
    source, cache = make("source", format_), tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    for i, file in enumerate(sorted(file for file in source.rglob("*") if file.is_file())):
        link = cache / "snapshots/1234" / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(shutil.copyfile(file, cache / f"blobs/{i}"))
    before = files(cache)
    for path in (cache, cache / "snapshots"):
        with open_checkpoint(path) as checkpoint:
            assert (checkpoint.format, checkpoint.config) == (format_, CONFIG)
            assert checkpoint.tokenizer is not None
    with pytest.raises(errors.DestinationError, match="must not hold the source"):
        convert(cache, cache / "blobs", format_, force=True)
    assert files(cache) == before
    (cache / "snapshots/5678").symlink_to(shutil.copytree(source, tmp_path / "other"))
    refused(cache, errors.UnknownFormatError, "snapshots/1234", "snapshots/5678")


@pytest.mark.parametrize("format_", WRITERS)
def test_the_nearest_checkpoint_whatever_is_deeper(tmp_path: Path, make, format_: Format) -> None:
    near = detect(make("source", format_))[1]
    deep = tmp_path / "source/steps/1"
    shutil.copytree(tmp_path / "source", deep)
    (deep / "model.safetensors").write_bytes(bytes(8) + b"{}")  # damaged
    (tmp_path / "source/itself").symlink_to(".")
    assert detect(tmp_path / "source") == (format_, near)
    (tmp_path / "latest").symlink_to("source")
    assert detect(tmp_path)[1].resolve() == near


@pytest.mark.parametrize("format_", [Format.HUGGINGFACE, Format.RECURRENTGEMMA])
@pytest.mark.parametrize("name", ["finetuned.safetensors", "weights.bin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_file_that_is_named_is_what_is_read(
    tmp_path: Path, make, format_: Format, name: str, sharded: bool
) -> None:
    """Its neighbours are not, but for the config, and the other files of an index that lists it."""
    path = "final_norm.scale"
    changes = {path: np.full(CONFIG.width, 7.0, np.float32)}
    tuned = make("tuned", format_, changes=changes)
    source = make("whole", format_)
    if sharded:
        convert(source, tmp_path / "sharded", format_, shard_size=10_000)
        source = tmp_path / "sharded"
    (tuned / "model.safetensors").rename(source / name)

    def scale(weights: Path) -> float:
        with open_checkpoint(weights) as checkpoint:
            assert checkpoint.tokenizer == source / "tokenizer.model"
            return next(value for spec, value in checkpoint if spec.path == path).mean()

    assert scale(source / name) == 7.0
    others = list(source.glob("model*.safetensors"))
    assert len(others) > sharded
    for other in [source, *others]:
        assert scale(other) != 7.0


@pytest.mark.parametrize(
    ("format_", "name"),
    [
        (Format.KAGGLE_FLAX, b".2b"),
        (Format.KAGGLE_FLAX, b"2b\xff"),
        (Format.KAGGLE_TORCH, b".2b.pt"),
    ],
)
def test_names_that_are_not_kept(tmp_path: Path, make, format_: Format, name: bytes) -> None:
    source = make("source", format_)
    path = detect(source)[1].rename(source / os.fsdecode(name))
    for to in (Format.KAGGLE_FLAX, Format.KAGGLE_TORCH):
        convert(path, tmp_path / to, to)
        with open_checkpoint(tmp_path / to) as reader:
            assert reader.config == CONFIG


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode")
@pytest.mark.parametrize("kind", [*WRITERS, "compressed", "ocdbt"])
def test_folders_whose_names_are_not_unicode(tmp_path: Path, make, refused, kind: str) -> None:
    """PyTorch and TensorStore cannot open what is in them."""
    name, words = os.fsdecode(b"caf\xe9"), "opens only names that are UTF-8: rename"
    if kind in list(Format):
        source = make(f"{name}/source", Format(kind))
    else:
        source = write_orbax(tmp_path / "source", ocdbt=kind == "ocdbt")
        source = source.rename(tmp_path / name)
    if kind in (Format.KAGGLE_TORCH, "compressed", "ocdbt"):
        refused(source, errors.PathError, words, to=Format.KAGGLE_FLAX, overrides=OVERRIDES)
        return
    out, database = source.with_name("out"), source.with_name("database")
    convert(source, out, Format.KAGGLE_FLAX)
    assert detect(out)[0] is Format.KAGGLE_FLAX
    steps = []
    for to in (Format.KAGGLE_FLAX, Format.KAGGLE_TORCH):  # it is said before anything is written
        with pytest.raises(errors.PathError, match=words) as caught:
            convert(source, database, to, ocdbt=to is Format.KAGGLE_FLAX, progress=steps.append)
        assert str(database) in str(caught.value)
    assert not steps
    assert not database.exists()


def test_weights_named_from_below(tmp_path: Path, make) -> None:
    below = make("source", Format.KAGGLE_FLAX) / "model/below"
    below.mkdir()
    convert(below / "..", tmp_path / "out", Format.KAGGLE_FLAX)
    assert detect(tmp_path / "out")[1] == tmp_path / "out/model"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_pipes_and_devices_are_no_checkpoints(tmp_path: Path, refused) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        refused(path, errors.UnknownFormatError, f"{path} is no Orbax checkpoint")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
@pytest.mark.parametrize(
    ("format_", "name", "error", "words"),
    [
        (Format.HUGGINGFACE, "config.json", errors.ConfigError, "lacks config.json"),
        (Format.KAGGLE_FLAX, "model/final_norm.scale/.zarray", errors.MismatchError, "missing fin"),
        (Format.KAGGLE_FLAX, "model/final_norm.scale/0", errors.DamagedError, "lacks 1 chunks"),
    ],
)
def test_pipes_in_checkpoints_are_not_waited_for(
    make, refused, format_: Format, name: str, error: type, words: str
) -> None:
    path = make("source", format_) / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(error, match=words), open_checkpoint(path.parents[name.count("/")]):
        raise AssertionError


def test_what_is_compressed_is_an_archive_if_it_holds_one(make) -> None:
    source = make("source", Format.KAGGLE_TORCH)
    (source / "notes.gz").write_bytes(gzip.compress(b"not a tar archive" * 100))
    (source / "half.gz").write_bytes(gzip.compress(b"not a tar archive" * 100)[:20])
    assert detect(source) == (Format.KAGGLE_TORCH, source / "model.pt")


def test_zip_archives_are_no_weights(tmp_path: Path, make, refused) -> None:
    source, other = make("source", Format.KAGGLE_TORCH), tmp_path / "other"
    other.mkdir()
    for file in (source / "library.jar", other / "notes.docx"):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("words/one", b"text")
    assert detect(source) == (Format.KAGGLE_TORCH, source / "model.pt")
    refused(other, errors.UnknownFormatError, f"{other} is no Orbax checkpoint")


def test_what_trainers_leave_beside_the_weights(make) -> None:
    source = make("source", Format.HUGGINGFACE)
    torch.save({"state": torch.zeros(3)}, source / "optimizer.pt")
    torch.save([1, 2], source / "training_args.bin")
    assert detect(source) == (Format.HUGGINGFACE, source)


def test_an_archive_knows_nothing_of_where_it_is_unpacked(tmp_path: Path, make) -> None:
    """Its root is the Orbax directory; what lies beside the destination is of another model."""
    source = make("source", Format.KAGGLE_FLAX)
    archive = shutil.make_archive(str(tmp_path / "2b-v1.1"), "gztar", source / "model")
    other = make("other", Format.RECURRENTGEMMA, CONFIGS["attention_last"])
    convert(archive, other / "out", Format.KAGGLE_FLAX, overrides=OVERRIDES)
    with open_checkpoint(other / "out") as checkpoint:
        assert checkpoint.config == CONFIG
        assert checkpoint.tokenizer is None
        assert checkpoint.path.name == "2b-v1.1"
    convert(other / "out", tmp_path / "again", Format.KAGGLE_FLAX)
    assert (tmp_path / "again" / "2b-v1.1").is_dir()


def test_weights_named_from_within_and_by_a_link(tmp_path: Path, make, monkeypatch) -> None:
    source = make("source", Format.KAGGLE_FLAX)
    (tmp_path / "link").symlink_to("source/model")
    monkeypatch.chdir(source / "model")
    for name in (Path(), Path("../../link"), tmp_path / "link"):
        with open_checkpoint(name) as checkpoint:
            assert checkpoint.config == CONFIG
            assert checkpoint.tokenizer is not None


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5368709120\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, r"is a git-lfs pointer: run `git lfs pull`"),
        (b"<!DOCTYPE html>\n<html>Sign in", "is a web page: the download needs a login"),
        (b"\n  <html>Sign in", "is a web page: the download needs a login"),
    ],
)
def test_what_a_failed_download_leaves_is_named(
    tmp_path: Path, make, refused, content: bytes, message: str
) -> None:
    source = make("source", Format.HUGGINGFACE)
    (source / "model.safetensors").write_bytes(content)
    refused(source, errors.DamagedError, message)
    refused(source / "model.safetensors", errors.DamagedError, message)
    for name in ("2b.pt", "pytorch_model.bin", "model.gguf"):
        alone = tmp_path / name.replace(".", "-")
        alone.mkdir()
        (alone / name).write_bytes(content)
        refused(alone, errors.DamagedError, message)
