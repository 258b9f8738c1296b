"""The one way in: the format of a path, told by its content, and the reader for it."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from recurrentgemma.common.errors import CheckpointError, DamagedError, UnknownFormatError
from recurrentgemma.common.io.checkpoint import CONFIG, checkpoint_path, read_config
from recurrentgemma.common.io.checkpoint import load_tokenizer as load_tokenizer_here
from recurrentgemma.common.io.files import scratch_folder
from recurrentgemma.common.io.shards import INDEX, WEIGHTS
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma.common.training.adapters import ADAPTERS
from recurrentgemma.common.vocabulary import TOKENIZER_FILES
from recurrentgemma_conversion.adapters import open_adapters
from recurrentgemma_conversion.archive import is_archive, unpack
from recurrentgemma_conversion.formats import Format
from recurrentgemma_conversion.names import config_from_fields
from recurrentgemma_conversion.names.others import require_no_other
from recurrentgemma_conversion.overrides import NO_OVERRIDES, Overrides
from recurrentgemma_conversion.peft import PEFT_CONFIG, PEFT_WEIGHTS
from recurrentgemma_conversion.peft_reader import PEFT_PICKLE
from recurrentgemma_conversion.readers.base import Headers, Reader, read_fields
from recurrentgemma_conversion.readers.gguf import MAGIC, GGUFReader
from recurrentgemma_conversion.readers.huggingface import EMBEDDING, HuggingFaceReader
from recurrentgemma_conversion.readers.kaggle_flax import DATABASE, KaggleFlaxReader
from recurrentgemma_conversion.readers.kaggle_torch import (
    PICKLE_INDEX,
    KaggleTorchReader,
    is_pickle,
)
from recurrentgemma_conversion.readers.native import NativeReader, open_tensors

READERS: dict[Format, Callable[[Path, Overrides, Headers], Reader]] = {
    Format.KAGGLE_FLAX: KaggleFlaxReader,
    Format.KAGGLE_TORCH: KaggleTorchReader,
    Format.HUGGINGFACE: HuggingFaceReader,
    Format.RECURRENTGEMMA: NativeReader,
    Format.GGUF: GGUFReader,
}
# Levels of folders around a checkpoint, at most: as in the cache of Hugging Face's hub.
_DEPTH = 3
_RUN, _RUN_MODEL, _BEST = "run.toml", "model", "best"
_LONGEST_PATH = 1000  # bytes
_WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack")
# What trainers write beside weights: Accelerate, Lightning and the Trainer of `transformers`.
_OF_TRAINERS = re.compile(
    r"(optimizer|scheduler|scaler|sampler|random_states|rng_state|custom_checkpoint|"
    r"training_args|dl_state_dict)[\w-]*\.(bin|pt|pth|pkl|safetensors)$"
)
# A model's name on a site: OWNER/MODEL, perhaps after the site's own name.
_NAME = re.compile(r"(hf:|kaggle:)?([\w-]+(?:/[\w.-]+)+)")


@contextlib.contextmanager
def open_checkpoint(
    path: str | os.PathLike[str] | None = None,
    overrides: Overrides = NO_OVERRIDES,
    scratch: Path | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Iterator[Reader]:
    """Opens a checkpoint of any format, its config known and its tensors checked against it.

    Args:
      path: A folder, one that holds a single checkpoint, a file of weights, or an archive; or a
        bundled model, see `checkpoint_path`.
      overrides: What the caller says of the model.
      scratch: An archive is unpacked beside this path for as long as the checkpoint is open; in
        the system's folder for temporary files if None.
      adapter: LoRA adapters that are added to the parameters as they are read: a file of ours or
        its folder, or a folder of PEFT's.

    Raises:
      CheckpointError: The path holds no checkpoint, several, or one that cannot be served; or the
        adapters cannot be read, or belong to another model.
    """
    with open_headers(path, overrides, scratch) as reader:
        reader.require()
        if adapter is not None:
            reader.adapters = open_adapters(adapter, reader.config)
        yield reader


@contextlib.contextmanager
def open_headers(
    path: str | os.PathLike[str] | None = None,
    overrides: Overrides = NO_OVERRIDES,
    scratch: Path | None = None,
) -> Iterator[Reader]:
    """`open_checkpoint` for callers that can do without the config: nothing is compared yet."""
    source = checkpoint_path(path)
    if not source.exists():
        raise _nothing_at(path, source)
    headers = Headers()
    format_, found = detect(source.absolute(), headers)
    if format_ is not None:
        yield READERS[format_](found, overrides, headers)
        return
    with scratch_folder(scratch or Path(tempfile.gettempdir(), "recurrentgemma")) as folder:
        # In a folder of its own with nothing beside it, under the archive's name.
        unpacked = folder / found.name.partition(".tar")[0]
        unpacked.mkdir()
        try:
            unpack(found, unpacked, folder.parent)
            format_, weights = detect(unpacked, headers)
            if format_ is None:
                raise UnknownFormatError(f"{source} is an archive in an archive")
            reader = READERS[format_](weights, overrides, headers)
            reader.named = lambda path: str(path).replace(str(unpacked), str(found))
            yield reader
        except CheckpointError as error:
            error.args = (str(error).replace(str(unpacked), str(found)),)
            raise


def open_config(path: Path) -> Config:
    """The config in a `config.json` alone, ours or Hugging Face's.

    Raises:
      ConfigError: It holds none.
      OtherModelError: It is the config of a model that is not read.
    """
    fields = read_fields(path) if path.is_file() else {}
    return config_from_fields(path, fields) if "model_type" in fields else read_config(path)


def load_tokenizer(path: str | os.PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint of any format, or in a file of its own.

    Args:
      path: The checkpoint, a folder with a `tokenizer.model` or `tokenizer.json`, or that file; or
        a bundled model, see `checkpoint_path`.

    Raises:
      ValueError: There is none.
    """
    source = checkpoint_path(path)
    around = source.is_dir() and not any((source / name).is_file() for name in TOKENIZER_FILES)
    if around or (source.is_file() and _kind(source)):
        with open_headers(source) as checkpoint:
            return checkpoint.load_tokenizer()
    return load_tokenizer_here(source)


def _nothing_at(path: object, source: Path) -> UnknownFormatError:
    """The error that a path does not exist; it may have been meant as a name on a site."""
    hint = ""
    if known := _NAME.fullmatch(str(path)):
        site, name = known.groups(default="hf:")
        hint = f"; to download {name}: recurrentgemma download {site}{name}"
    return UnknownFormatError(f"no checkpoint folder at {source}, nor a file{hint}")


def detect(path: Path, headers: Headers | None = None) -> tuple[Format | None, Path]:
    """The format of a checkpoint and where its weights are; no format for an archive.

    A training run stands for the model that it ended with. What is parsed stays in `headers`.

    Raises:
      UnknownFormatError: There is no checkpoint, or several (they are named).
      OtherModelError: The checkpoint holds a model that is not read.
    """
    path, headers = _named_by(path), headers or Headers()
    _require_no_adapters(path)
    if (path / _RUN).is_file():
        if not (path / _RUN_MODEL).is_dir():
            raise UnknownFormatError(
                f"{path} is a training run that has not ended: name one of the folders in "
                f"{path / 'checkpoints'}, or go on with it by recurrentgemma train --resume"
            )
        path = path / _RUN_MODEL
    found = _nearest(path)
    if not found:
        missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
        raise UnknownFormatError(
            f"{path} is no Orbax checkpoint, PyTorch state dict or archive, and as a folder of "
            f"safetensors it lacks {', '.join(missing)}"
        )
    if len(found) > 1:
        formats = [_format(where, headers) or "an archive" for where in found]
        several = ", ".join(f"{where} ({f})" for where, f in zip(found, formats, strict=True))
        raise UnknownFormatError(f"{path} holds several checkpoints, name one: {several}")
    return _format(found[0], headers), found[0]


def _require_no_adapters(path: Path) -> None:
    """Raises `UnknownFormatError` for adapters that stand without a model."""
    names = (ADAPTERS, PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PICKLE)
    folder = path if path.is_dir() else path.parent
    here = any((path / name).is_file() for name in names) if path.is_dir() else path.name in names
    if not here or (folder / CONFIG).is_file() or (folder / _RUN_MODEL).is_dir():
        return
    fields = read_fields(folder / PEFT_CONFIG) if (folder / PEFT_CONFIG).is_file() else {}
    base = fields.get("base_model_name_or_path") or "the model that they were trained on"
    raise UnknownFormatError(
        f"{path} holds adapters and no model: give {base} as the checkpoint, and {path} as the "
        "adapter (--adapter)"
    )


def _named_by(path: Path) -> Path:
    """The checkpoint whose path is in a run's file `best`: file systems may lack links."""
    if path.name == _BEST and path.is_file() and path.stat().st_size < _LONGEST_PATH:
        named = path.parent / path.read_text(encoding="utf-8").strip()
        if named.is_dir():
            return named
    return path


def _nearest(path: Path) -> list[Path]:
    """The checkpoints at a path or, if there are none, the least deep in the folders in it.

    A checkpoint with several names counts once; a file to which another's links lead does not.
    """
    found: dict[Path, int] = {}
    folders = [path]
    for depth in range(_DEPTH + 1):
        inside: list[Path] = []
        for folder in folders:
            here = _weights_at(folder)
            found |= dict.fromkeys(here, depth)
            if not here and folder.is_dir():
                inside += [child for child in sorted(folder.iterdir()) if child.is_dir()]
        folders = [folder for folder in inside if not folder.name.startswith(".")]
    if len(found) < 2:
        return list(found)
    # The last name counts: a link, with the checkpoint's other files beside it, or the nearest.
    names = sorted(found, key=lambda where: (where.is_symlink(), -found[where]))
    places = {where.resolve(): where for where in names}
    files = (file for where in places.values() for file in where.rglob("*") if file.is_file())
    linked = {file.resolve() for file in files if file.is_symlink()}
    alone = [where for place, where in places.items() if place not in linked]
    least = min(found[where] for where in alone)
    return [where for where in alone if found[where] == least]


def _weights_at(path: Path) -> list[Path]:
    """The checkpoints right at a path: it or, in a folder, files; not opened yet."""
    if path.is_file():
        return [path] if _kind(path) else []
    if not path.is_dir():
        return []  # a pipe or a device
    if _is_orbax(path):
        return [path]
    files = [
        file
        for file in sorted(path.iterdir())
        if file.is_file() and not _OF_TRAINERS.match(file.name)
    ]
    for file in files:
        if file.suffix in _WEIGHTS_SUFFIXES:
            _kind(file)
    others = [file for file in files if file.suffix != ".safetensors" and file.name != INDEX]
    found = [path] if len(others) < len(files) else []
    if found and (path / CONFIG).is_file():
        return found  # what else is there may be an optimiser's
    if (path / PICKLE_INDEX).is_file():
        return [path]
    return found + [file for file in others if not file.name.startswith(".") and _kind(file)]


def _kind(path: Path) -> str | None:
    """The kind of a file by its first bytes: safetensors, pickle, GGUF, archive, or None."""
    with path.open("rb") as file:
        start = file.read(64)
    if path.suffix in _WEIGHTS_SUFFIXES:
        _require_weights(path, start)
    if is_pickle(path):
        return "pickle"
    if start[:4] == MAGIC:
        return "gguf"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "safetensors"
    return "archive" if path.stat().st_size and is_archive(path) else None


def _require_weights(path: Path, start: bytes) -> None:
    """Raises `DamagedError` for what a failed download leaves in place of weights."""
    if start.startswith(b"version https://git-lfs"):
        what = "a git-lfs pointer: run `git lfs pull` in its folder"
    elif start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        what = "a web page: the download needs a login or a licence"
    else:
        return
    raise DamagedError(f"{path} is {what}, or download the checkpoint again")


def _is_orbax(path: Path) -> bool:
    marks = ("_METADATA", DATABASE)
    return any((path / mark).is_file() for mark in marks) or any(path.glob("*/.zarray"))


def _format(path: Path, headers: Headers) -> Format | None:
    """The format of weights; None for an archive.

    The config beside safetensors tells whether they are Hugging Face's or ours. Without it neither
    can be read: the tensors' names then tell whose config is missing.
    """
    if path.is_dir() and _is_orbax(path):
        return Format.KAGGLE_FLAX
    kind = None if path.is_dir() else _kind(path)
    if kind in ("gguf", "archive"):
        return Format.GGUF if kind == "gguf" else None
    tensors = open_tensors(path, headers).tensors if kind == "pickle" else None
    if tensors is not None and not any(name.endswith(EMBEDDING) for name in tensors):
        return Format.KAGGLE_TORCH
    config = (path if path.is_dir() else path.parent) / CONFIG
    if config.is_file():
        fields = headers.once(read_fields, config)
        return Format.HUGGINGFACE if "model_type" in fields else Format.RECURRENTGEMMA
    names = list(open_tensors(path, headers).tensors if tensors is None else tensors)
    require_no_other(path, names)
    ours = any(name.startswith(("embedder.", "blocks.", "final_norm.")) for name in names)
    return Format.RECURRENTGEMMA if ours else Format.HUGGINGFACE
