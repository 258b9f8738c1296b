"""Which format a path holds, told by content, and the reader for it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from recurrentgemma.common.checkpoint import BUNDLED, CONFIG, TOKENIZER
from recurrentgemma.common.checkpoint import load_tokenizer as load_tokenizer_here
from recurrentgemma.common.errors import CheckpointError, UnknownFormatError
from recurrentgemma.common.files import expanded, scratch_folder
from recurrentgemma.common.shards import INDEX, WEIGHTS, Shards
from recurrentgemma.common.text import Tokenizer
from recurrentgemma_conversion.archive import is_archive, unpack
from recurrentgemma_conversion.formats import Format, Reader, require_recurrent
from recurrentgemma_conversion.huggingface import HuggingFaceReader, read_fields
from recurrentgemma_conversion.kaggle_flax import DATABASE, KaggleFlaxReader
from recurrentgemma_conversion.kaggle_torch import KaggleTorchReader
from recurrentgemma_conversion.native import NativeReader
from recurrentgemma_conversion.overrides import ANY_MODEL, NO_OVERRIDES, Overrides

READERS: dict[Format, Callable[[Path, Overrides], Reader]] = {
    Format.KAGGLE_FLAX: KaggleFlaxReader,
    Format.KAGGLE_TORCH: KaggleTorchReader,
    Format.HUGGINGFACE: HuggingFaceReader,
    Format.RECURRENTGEMMA: NativeReader,
}
# Levels of folders around a checkpoint, at most: as in the cache of the hub of Hugging Face.
_DEPTH = 3


@contextlib.contextmanager
def open_checkpoint(
    path: str | os.PathLike[str] | None = None,
    overrides: Overrides = NO_OVERRIDES,
    scratch: Path | None = None,
) -> Iterator[Reader]:
    """Opens a checkpoint of any format.

    Args:
      path: A folder, one that holds a single checkpoint, a file of weights, or an archive; the
        bundled model if None.
      overrides: What the caller says of the model.
      scratch: Beside which path an archive is unpacked, for as long as the checkpoint is open; in
        the system's folder for temporary files if None.

    Raises:
      CheckpointError: There is none, more than one, or it cannot be served.
    """
    source = BUNDLED if path is None else expanded(path)
    if not source.exists():
        raise UnknownFormatError(f"no checkpoint folder at {source}, nor a file")
    format_, found = detect(source.absolute())
    if format_ is not None:
        yield READERS[format_](found, overrides)
        return
    with scratch_folder(scratch or Path(tempfile.gettempdir(), "recurrentgemma")) as folder:
        # In a folder of its own, beside which nothing is, under the archive's name.
        unpacked = folder / found.name.partition(".tar")[0]
        unpacked.mkdir()
        try:
            unpack(found, unpacked)
            format_, weights = detect(unpacked)
            if format_ is None:
                raise UnknownFormatError(f"{source} is an archive in an archive")
            reader = READERS[format_](weights, overrides)
            reader.named = lambda path: str(path).replace(str(unpacked), str(found))
            yield reader
        except CheckpointError as error:
            error.args = (str(error).replace(str(unpacked), str(found)),)
            raise


def load_tokenizer(path: str | os.PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint of any format, or in a sentencepiece model file.

    Args:
      path: The checkpoint, a folder with a `tokenizer.model`, or that file; the bundled model's if
        None.

    Raises:
      ValueError: There is none.
    """
    source = BUNDLED if path is None else expanded(path)
    around = source.is_dir() and not (source / TOKENIZER).is_file()
    if around or (source.is_file() and _detect_file(source)):
        with open_checkpoint(source, ANY_MODEL) as checkpoint:
            return checkpoint.load_tokenizer()
    return load_tokenizer_here(source)


def detect(path: Path) -> tuple[Format | None, Path]:
    """The format of a checkpoint and where its weights are; no format for an archive.

    Raises:
      UnknownFormatError: There is no checkpoint, or several (they are named).
      NotRecurrentGemmaError: There is one of another model.
    """
    found = _search(path, _DEPTH)
    if len(found) > 1:
        inside = (file for _, where in found for file in (where, *where.rglob("*")))
        linked = {file.resolve() for file in inside if file.is_symlink()}
        found = [it for it in found if it[1].is_symlink() or it[1].resolve() not in linked]
    if not found:
        missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
        raise UnknownFormatError(
            f"{path} is no Orbax checkpoint, PyTorch state dict or archive, and as a folder of "
            f"safetensors it lacks {', '.join(missing)}"
        )
    if len(found) > 1:
        several = ", ".join(f"{where} ({format_ or 'an archive'})" for format_, where in found)
        raise UnknownFormatError(f"{path} holds several checkpoints, name one: {several}")
    return found[0]


def _search(path: Path, depth: int) -> list[tuple[Format | None, Path]]:
    """The checkpoints right at a path or, if there are none, in each of the folders in it."""
    found = _detect(path)
    if not found and depth and path.is_dir():
        for child in sorted(path.iterdir()):
            if child.is_dir() and not child.name.startswith("."):
                found += _search(child, depth - 1)
    return found


def _detect(path: Path) -> list[tuple[Format | None, Path]]:
    """The checkpoints right at a path."""
    if path.is_file():
        return _detect_file(path)
    if not path.is_dir():
        return []  # a pipe or a device
    if _is_orbax(path):
        return [(Format.KAGGLE_FLAX, path)]
    files = [file for file in sorted(path.iterdir()) if file.is_file()]
    found: list[tuple[Format | None, Path]] = []
    if any(file.name == INDEX or file.name.endswith(".safetensors") for file in files):
        found.append((_safetensors_format(path), path))
        if (path / CONFIG).is_file():
            return found  # what else is there may be an optimiser's
    for file in files:
        if not file.name.startswith(".") and file.suffix != ".safetensors":
            found += _detect_file(file)
    return found


def _detect_file(path: Path) -> list[tuple[Format | None, Path]]:
    with path.open("rb") as file:
        start = file.read(16)
    if start[:4] == b"PK\x03\x04" or b"\x80\x02" <= start[:2] <= b"\x80\x05":
        return [(Format.KAGGLE_TORCH, path)]
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return [(_safetensors_format(path), path)]
    if path.stat().st_size and is_archive(path):
        return [(None, path)]
    return []


def _is_orbax(path: Path) -> bool:
    marks = ("_METADATA", DATABASE)
    return any((path / mark).is_file() for mark in marks) or any(path.glob("*/.zarray"))


def _safetensors_format(path: Path) -> Format:
    """Hugging Face's or ours, by the config beside the weights, or else by the tensors' names."""
    config = (path if path.is_dir() else path.parent) / CONFIG
    if config.is_file() and "model_type" in read_fields(config):
        return Format.HUGGINGFACE
    names = list(Shards(path).tensors)
    require_recurrent(path, names)
    ours = any(name.startswith(("embedder.", "blocks.", "final_norm.")) for name in names)
    return Format.RECURRENTGEMMA if ours or config.is_file() else Format.HUGGINGFACE
