"""Damaged files and pickles with code: named, and nothing is written."""

import errno
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from checkpoints import CONFIGS, files, write_orbax

from recurrentgemma.common import errors
from recurrentgemma_conversion import Format, Overrides, convert, detect, open_checkpoint
from recurrentgemma_conversion.convert import WRITERS

pytest.importorskip("torch.nn", reason="torch is not installed")
import torch

ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")

CONFIG = CONFIGS["griffin"]
OVERRIDES = Overrides(None, True, 8, 5.0)  # what its shapes do not tell


@pytest.mark.parametrize("format_", [Format.RECURRENTGEMMA, Format.HUGGINGFACE])
@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_safetensors(make, refused, format_: Format, keep: int) -> None:
    source = make("source", format_)
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(source, errors.DamagedError, "model.safetensors is no complete safetensors file")


def test_surplus_bytes(make, refused) -> None:
    source = make("source", Format.RECURRENTGEMMA)
    with (source / "model.safetensors").open("ab") as file:
        file.write(b"x")
    refused(source, errors.DamagedError, "bytes are expected")


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_truncated_zip(make, refused, keep: float) -> None:
    path = make("source", Format.KAGGLE_TORCH) / "model.pt"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    refused(path.parent, errors.DamagedError, "model.pt is cut short")


@pytest.mark.parametrize("how", ["missing", "truncated"])
@pytest.mark.parametrize("layout", ["ours", "zarr"])
def test_damaged_zarr_chunks(tmp_path: Path, make, refused, layout: str, how: str) -> None:
    if layout == "ours":
        source = make("source", Format.KAGGLE_FLAX)
    else:
        source = write_orbax(tmp_path / "source", ocdbt=False)
    chunk = source / "model/blocks.3.mlp_block.ffw_down.kernel/0.0"
    if how == "missing":
        chunk.unlink()
        words = ["lacks 1 chunks", "blocks.3.mlp_block.ffw_down.kernel"]
    else:
        chunk.write_bytes(chunk.read_bytes()[:-10])
        words = ["blocks.3.mlp_block.ffw_down.kernel"]
    refused(source, errors.DamagedError, *words, to=Format.KAGGLE_TORCH, overrides=OVERRIDES)


@pytest.mark.parametrize("wrapped", [False, True])
def test_damaged_databases(tmp_path: Path, refused, wrapped: bool) -> None:
    source = write_orbax(tmp_path / "source", ocdbt=True, wrapped=wrapped)
    with open_checkpoint(source, OVERRIDES) as reader:
        assert reader.config == CONFIG
    convert(source, tmp_path / "whole", Format.KAGGLE_TORCH, overrides=OVERRIDES)
    root, whole, damaged = source / "model", files(tmp_path / "whole"), []
    for file in [root / "manifest.ocdbt", *root.glob("ocdbt.process_0/d/*"), *root.glob("d/*")]:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        try:
            convert(source, tmp_path / "out", Format.KAGGLE_TORCH, overrides=OVERRIDES)
        except errors.DamagedError:
            damaged.append(file.name)
        else:  # Orbax leaves superseded files behind
            assert files(tmp_path / "out") == whole
            shutil.rmtree(tmp_path / "out")
        file.write_bytes(content)
    assert "manifest.ocdbt" in damaged
    assert len(damaged) >= 3
    for file in root.glob("ocdbt.process_0/d/*"):
        file.unlink()
    refused(
        source, errors.DamagedError, "cannot be read", to=Format.KAGGLE_TORCH, overrides=OVERRIDES
    )


def test_damaged_metadata_of_an_array(make, refused) -> None:
    source = make("source", Format.KAGGLE_FLAX)
    path = source / "model/final_norm.scale/.zarray"
    metadata = json.loads(path.read_text()) | {"fill_value": 0.0}
    for text in ("{", json.dumps(metadata | {"dimension_separator": "x" * 300})):
        path.write_text(text)
        refused(source, errors.DamagedError, "final_norm.scale/.zarray is damaged")


def test_damaged_index(tmp_path: Path, make, refused) -> None:
    convert(
        make("whole", Format.RECURRENTGEMMA), tmp_path / "source", Format.HUGGINGFACE,
        shard_size=30_000,
    )  # fmt: skip
    source = tmp_path / "source"
    index = source / "model.safetensors.index.json"
    text, (first,) = index.read_text(), source.glob("model-00001-*")
    index.write_text(text[:-20])
    refused(source, errors.DamagedError, "is no index of files with tensors")
    for name in ("../model.safetensors", "..", ""):
        index.write_text(text.replace(first.name, name))
        refused(source, errors.DamagedError, "must be a name in this folder")
    index.write_text(text.replace('"model.final_norm.weight": ', '"model.norm.weight": '))
    refused(source, errors.MismatchError, "no model.norm.weight in", "model.final_norm.weight in")
    index.write_text(text.replace("model-00001-of", "x" * 300))
    refused(source, errors.DamagedError, "lacks xxx")
    index.write_text(text)
    shards = sorted(source.glob("model-*"))
    shards[0].rename(tmp_path / "first")
    shards[-1].rename(tmp_path / "last")
    refused(source, errors.DamagedError, f"lacks {shards[0].name}, {shards[-1].name}")


class Code:
    """Runs when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_pickles_with_code(tmp_path: Path, refused, kind: str) -> None:
    mark, path = tmp_path / "ran", tmp_path / "model.pt"
    if kind == "bare":
        path.write_bytes(pickle.dumps({"a": Code(mark)}, 2))
    else:
        torch.save({"a": Code(mark)}, path, _use_new_zipfile_serialization=kind == "zip")
    refused(path, errors.UnsafePickleError, "could run code", "mkdir")
    assert not mark.exists()


@pytest.mark.parametrize("content", [[1], {"a": 1}, {"a": {"b": torch.zeros(1)}}, {}])
def test_pickles_of_other_things(tmp_path: Path, refused, content) -> None:
    torch.save(content, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", errors.UnsafePickleError, "must hold")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_of_tensors(tmp_path: Path, refused) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    torch.save({"final_norm.scale": nested}, tmp_path / "model.pt")
    try:
        torch.load(tmp_path / "model.pt", weights_only=True)
    except pickle.UnpicklingError:  # newer versions of PyTorch refuse it themselves
        reason = "no plain state dict"
    else:
        reason = "tensors alone, got final_norm.scale"
    refused(tmp_path / "model.pt", errors.UnsafePickleError, reason)


@pytest.mark.parametrize("format_", WRITERS)
def test_archives(tmp_path: Path, make, refused, format_: Format) -> None:
    source = make("source", format_)
    path = tmp_path / "archive.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for file in source.iterdir():
            archive.add(file, f"./{file.name}")
    convert(path, tmp_path / "same", format_)
    assert files(tmp_path / "same") == files(source)
    shutil.rmtree(tmp_path / "same")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(path, errors.DamagedError, "archive.tar.gz cannot be unpacked")


def test_an_archive_whose_checksum_is_another(tmp_path: Path, make, refused) -> None:
    source = make("source", Format.RECURRENTGEMMA)
    path = Path(shutil.make_archive(str(tmp_path / "archive"), "gztar", source))
    content = path.read_bytes()
    for damaged in (content[:-4], content[:-8] + bytes(8)):
        path.write_bytes(damaged)
        refused(path, errors.DamagedError, f"{path} cannot be unpacked")


def test_what_is_wrong_in_an_archive_is_named_after_it(tmp_path: Path, make, refused) -> None:
    source = make("source", Format.KAGGLE_FLAX)
    shutil.rmtree(source / "model/final_norm.scale")
    path = Path(shutil.make_archive(str(tmp_path / "archive"), "gztar", source))
    refused(path, errors.MismatchError, f"{path}/model: the tensors do not match the config")


def test_no_place_for_what_is_in_an_archive(tmp_path: Path, make, refused, monkeypatch) -> None:
    source = make("source", Format.KAGGLE_TORCH)
    path = Path(shutil.make_archive(str(tmp_path / "archive"), "tar", source))

    def read_only(*args, **kwargs) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "name")

    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    refused(path, errors.DestinationError, f"cannot write {tmp_path / 'out'}: Permission denied")


def test_archives_that_reach_outside(tmp_path: Path, refused) -> None:
    (tmp_path / "evil").write_text("x")
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "evil", "../../evil")
    refused(tmp_path / "archive.tar.gz", errors.DamagedError, "cannot be unpacked")


def member_of(name: str, **fields) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(member, field, value)
    return member


@pytest.mark.parametrize(
    ("member", "format_"),
    [
        (member_of("x", mtime=1e30), tarfile.PAX_FORMAT),
        (member_of("x", mtime=10**25), tarfile.GNU_FORMAT),
        (
            member_of("x", pax_headers={"GNU.sparse.map": "a,b", "GNU.sparse.size": "5"}),
            tarfile.PAX_FORMAT,
        ),
        (member_of("x", type=tarfile.LNKTYPE, linkname="nothing"), tarfile.PAX_FORMAT),
        (member_of("model.pt/x"), tarfile.PAX_FORMAT),
        (member_of("."), tarfile.PAX_FORMAT),
        (member_of("x" * 300), tarfile.PAX_FORMAT),
    ],
    ids=["mtime", "mtime of GNU", "sparse", "link", "in a file", "dot", "long"],
)
def test_members_that_cannot_be(
    tmp_path: Path, make, refused, member: tarfile.TarInfo, format_: int
) -> None:
    source = make("source", Format.KAGGLE_TORCH)
    with tarfile.open(tmp_path / "archive.tar", "w", format=format_) as archive:
        archive.add(source, ".")
        archive.addfile(member)
    refused(tmp_path / "archive.tar", errors.DamagedError, "archive.tar cannot be unpacked: ")


def test_a_disk_that_becomes_full_under_an_archive(
    tmp_path: Path, make, refused, monkeypatch
) -> None:
    path = Path(shutil.make_archive(str(tmp_path / "a"), "tar", make("it", Format.KAGGLE_TORCH)))

    def full(*args, **kwargs) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tarfile.TarFile.extractall", full)
    refused(path, errors.DiskSpaceError, f"the disk of {tmp_path} became full")


@pytest.mark.parametrize("content", [b"", b"\x80"])
def test_files_of_no_byte_or_one(tmp_path: Path, make, refused, content: bytes) -> None:
    (tmp_path / "alone").write_bytes(content)
    refused(tmp_path / "alone", errors.UnknownFormatError, "is no Orbax checkpoint")
    source = make("source", Format.RECURRENTGEMMA)
    (source / "beside").write_bytes(content)
    assert detect(source) == (Format.RECURRENTGEMMA, source)


def test_a_zip_that_is_no_state_dict(tmp_path: Path, refused) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("a.txt", "a")
    refused(tmp_path / "model.pt", errors.DamagedError, "cannot be read")
