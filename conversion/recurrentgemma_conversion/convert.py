"""From any format to any other: one loop over the layer spec."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.errors import (
    DestinationError,
    MismatchError,
    NonFiniteError,
    TokenizerError,
    VerificationError,
)
from recurrentgemma.common.io.arrays import Stacked, count_nonfinite, float_dtype, same_bits
from recurrentgemma.common.io.checkpoint import checkpoint_path
from recurrentgemma.common.io.files import destination_path, expanded, flush, whole_folder
from recurrentgemma.common.io.shards import SHARD_SIZE
from recurrentgemma.common.model.layer_spec import ParamSpec
from recurrentgemma.common.quantization import Quantized, require_scheme, scheme_for
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma_conversion.formats import Format, require_utf8
from recurrentgemma_conversion.names import family_of, layout
from recurrentgemma_conversion.names.table import Layout
from recurrentgemma_conversion.opening import READERS, detect, open_checkpoint
from recurrentgemma_conversion.overrides import NO_OVERRIDES, Overrides
from recurrentgemma_conversion.readers.base import (
    Contents,
    Headers,
    Reader,
    Writer,
    require_size,
    write_files,
)
from recurrentgemma_conversion.readers.huggingface import write_huggingface
from recurrentgemma_conversion.readers.kaggle_flax import write_kaggle_flax
from recurrentgemma_conversion.readers.kaggle_torch import import_torch, write_kaggle_torch
from recurrentgemma_conversion.readers.native import write_native

WRITERS: dict[Format, Writer] = {
    Format.KAGGLE_FLAX: write_kaggle_flax,
    Format.KAGGLE_TORCH: write_kaggle_torch,
    Format.HUGGINGFACE: write_huggingface,
    Format.RECURRENTGEMMA: write_native,
}
Tell = Callable[["Progress"], None]


class Progress(NamedTuple):
    """How far a conversion is, told before each parameter and at the end of each phase.

    Attributes:
      phase: "write" or "verify".
      path: The parameter that comes next; "" at the end.
      tensors: Parameters done.
      total_tensors: Parameters in all.
      bytes: Bytes done, as written.
      total_bytes: Bytes in all.
    """

    phase: str
    path: str
    tensors: int
    total_tensors: int
    bytes: int
    total_bytes: int


class Summary(NamedTuple):
    """What a conversion did.

    Attributes:
      source_format: The format of the source.
      format: The format of the result.
      tensors: Number of parameters.
      values: Number of values.
      bytes: Bytes of the parameters as written.
      dtypes: The dtypes written.
      seconds: The time it took, verification included.
      verified: Whether the result was read again and compared.
      nonfinite: Values that are NaN or infinite, by parameter, where they are allowed.
      left_out: The source's tensors of other parts, such as a vision encoder.
      notes: How the config as written differs from the published one.
    """

    source_format: Format
    format: Format
    tensors: int
    values: int
    bytes: int
    dtypes: list[str]
    seconds: float
    verified: bool
    nonfinite: dict[str, int]
    left_out: list[str]
    notes: list[str]


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: Format | str,
    *,
    dtype: str | None = None,
    shard_size: int = SHARD_SIZE,
    ocdbt: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
    overrides: Overrides = NO_OVERRIDES,
    quantize: str | None = None,
    allow_nonfinite: bool = False,
    strict: bool = False,
    window_as_published: bool = False,
    force: bool = False,
    verify: bool = True,
    progress: Tell = lambda step: None,
) -> Summary:
    """Writes a checkpoint in another format: whole and verified, or not at all.

    Every parameter keeps its bits, unless cast. One is in memory at a time.

    Args:
      source: A checkpoint of any format, or an archive.
      destination: The folder to make.
      to: The format of the result.
      dtype: The dtype to cast the parameters to, to nearest, ties to even. No cast if None, but
        quantised tensors of a GGUF become bfloat16.
      shard_size: Bytes in a safetensors file, at most.
      ocdbt: Whether a `kaggle-flax` result is an OCDBT database, not a file for each array.
      tokenizer: A `tokenizer.model` or `tokenizer.json`, if none is beside the weights.
      overrides: What the caller says of the model.
      quantize: The scheme in which matrices are stored (see `common.quantization`), in our own
        format, or in `huggingface` as `compressed-tensors`, with linear layers alone. If None a
        source that is quantised stays so in our own format without a dtype, and is dequantised in
        any other case.
      allow_nonfinite: Whether NaN and infinity are accepted.
      strict: Whether a checkpoint with other parts than the text model is refused.
      window_as_published: Whether a `huggingface` result states the window as the published
        checkpoints do, with which `transformers` sees one key fewer.
      force: Whether to replace what is at `destination`.
      verify: Whether to read the result again and compare all bits before it takes its name.
      progress: Called as the work goes on.

    Raises:
      CheckpointError: A subclass names the problem. Nothing was written.
    """
    started = time.perf_counter()
    to = Format(to)
    if not isinstance(shard_size, int) or shard_size < 1:
        raise DestinationError(f"shard_size must be a positive integer, got {shard_size!r}")
    if to not in WRITERS:
        raise DestinationError(f"{to} is only read: the result must be {' or '.join(WRITERS)}")
    if ocdbt and to is not Format.KAGGLE_FLAX:
        raise DestinationError(f"ocdbt is a layout of {Format.KAGGLE_FLAX}, not of {to}")
    target = destination_path(destination)
    if verify and to is Format.KAGGLE_TORCH:
        import_torch("verifying a .pt file, which can be left out,")
        require_utf8(target, "PyTorch")
    if ocdbt:
        require_utf8(target, "TensorStore")
    _require_folder_name(target, force)
    with open_checkpoint(source, overrides, target) as reader:
        _require_apart(target, source, reader)
        if strict and reader.left_out:
            what = f"{reader.path} must hold a text model alone"
            raise MismatchError(what, [f"unexpected {name}" for name in reader.left_out])
        specs = reader.specs
        dtypes = (
            dict(reader.dtypes) if dtype is None else {s.path: float_dtype(dtype) for s in specs}
        )
        needed = tokenizer is not None or to is Format.RECURRENTGEMMA
        found = find_tokenizer(reader, tokenizer) if needed or reader.tokenizer else None
        kept = to is reader.format and tokenizer is None  # what goes with the source's tokenizer
        ids = reader.special_ids if kept else {}
        scheme = _scheme(reader, to, dtype, quantize)
        contents = Contents(
            reader.config,
            dtypes,
            _name(reader),
            shard_size,
            found,
            ocdbt,
            ids,
            window_as_published,
            scheme,
        )
        stored = layout(reader.config, to)
        total = sum(stored.stored_bytes(s, dtypes[s.path].itemsize, scheme) for s in specs)
        with whole_folder(target, force=force, size=total) as folder:
            nonfinite = _write(reader, folder, to, stored, contents, progress)
            if nonfinite and not allow_nonfinite:
                raise NonFiniteError(_nonfinite_message(reader.path, nonfinite))
            if found is not None:
                write_files(folder, found.files())
            if kept:
                for companion in reader.companions:
                    shutil.copyfile(companion, folder / companion.name)
            if verify:
                with ThreadPoolExecutor(1) as disk:
                    flushed = disk.submit(flush, folder)  # while the values are compared
                    _verify(reader, folder, to, stored, contents, progress)
                    flushed.result()
        return Summary(
            source_format=reader.format,
            format=to,
            tensors=len(specs),
            values=sum(spec.size for spec in specs),
            bytes=total,
            dtypes=_stored_dtypes(contents, stored),
            seconds=time.perf_counter() - started,
            verified=verify,
            nonfinite=nonfinite,
            left_out=reader.left_out,
            notes=_notes(contents, stored) if to is Format.HUGGINGFACE else [],
        )


def _write(
    reader: Reader, folder: Path, to: Format, stored: Layout, contents: Contents, tell: Tell
) -> dict[str, int]:
    """Writes every parameter; counts the values that are NaN or infinite, where there are any."""
    counts: dict[str, Future[int]] = {}
    meter = _Meter("write", stored, contents, tell)
    with ThreadPoolExecutor(1) as counter:  # beside the writing, which waits for the disk

        def read(spec: ParamSpec) -> np.ndarray | Stacked | Quantized:
            meter.next(spec.path)
            if counts:
                list(counts.values())[-1].result()  # so that few parameters are in memory
            parameter, dtype = (
                _parameter(reader, spec, stored, contents),
                contents.dtypes[spec.path],
            )
            # The scale of a quantised matrix tells: one of NaN or infinity is neither finite.
            quantized = isinstance(parameter, Quantized)
            told = (parameter.scale, None) if quantized else (parameter, dtype)
            counts[spec.path] = counter.submit(count_nonfinite, *told)
            return parameter

        with WRITERS[to](folder, contents) as write:
            for name, tensor in stored.encode(read):
                write(name, tensor)
    meter.next()
    return {path: count for path, found in counts.items() if (count := found.result())}


def _verify(
    reader: Reader, folder: Path, to: Format, stored: Layout, contents: Contents, tell: Tell
) -> None:
    """Reads what was written and compares it with the source, bit for bit after the cast."""
    headers = Headers()
    _, weights = detect(folder, headers)
    written = READERS[to](weights, NO_OVERRIDES, headers)
    written.require()
    if written.config != contents.config:
        raise VerificationError(f"the config reads back as {written.config}")
    wrong = []
    meter = _Meter("verify", stored, contents, tell)
    for spec in reader.specs:
        meter.next(spec.path)
        parameter = _parameter(reader, spec, stored, contents)
        if isinstance(parameter, Quantized):
            back: Any = written.read_stored(spec)
            parts = parameter.parts.items()
            same = written.stored_in(spec) == parameter.scheme and all(
                same_bits(part, back.parts[name]) for name, part in parts
            )
        else:
            same = same_bits(parameter, written.read_parts(spec), contents.dtypes[spec.path])
        if not same:
            wrong.append(spec.path)
    meter.next()
    if wrong:
        raise VerificationError(f"these parameters differ when read back: {', '.join(wrong)}")


def _scheme(reader: Reader, to: Format, dtype: str | None, wanted: str | None) -> str | None:
    """The scheme of the result."""
    if wanted is None:
        return reader.scheme if to is Format.RECURRENTGEMMA and dtype is None else None
    if to not in (Format.RECURRENTGEMMA, Format.HUGGINGFACE):
        raise DestinationError(
            f"quantised weights are stored as {Format.RECURRENTGEMMA} or {Format.HUGGINGFACE}, got "
            f"{to} with {wanted}"
        )
    return require_scheme(wanted)


def _parameter(
    reader: Reader, spec: ParamSpec, stored: Layout, contents: Contents
) -> np.ndarray | Stacked | Quantized:
    """A parameter as it is written, but for a cast."""
    if stored.scheme_for(spec, contents.scheme) is None:
        return reader.read_parts(spec)
    return reader.quantized(spec, contents.scheme)


def _stored_dtypes(contents: Contents, stored: Layout) -> list[str]:
    """What the result stores: its scheme, and the dtypes of what that leaves."""
    specs = stored.specs
    left = [spec.path for spec in specs if stored.scheme_for(spec, contents.scheme) is None]
    names = sorted({contents.dtypes[path].name for path in left})
    return names if contents.scheme is None else [contents.scheme, *names]


class _Meter:
    """Tells how far a phase is."""

    def __init__(self, phase: str, stored: Layout, contents: Contents, tell: Tell) -> None:
        self._sizes = {
            s.path: stored.stored_bytes(s, contents.dtypes[s.path].itemsize, contents.scheme)
            for s in stored.specs
        }
        self._phase, self._tell = phase, tell
        self._tensors = self._bytes = 0

    def next(self, path: str = "") -> None:
        """A parameter begins, and the one before is done; all are done at ""."""
        count, total = len(self._sizes), sum(self._sizes.values())
        self._tell(Progress(self._phase, path, self._tensors, count, self._bytes, total))
        self._tensors += 1
        self._bytes += self._sizes.get(path, 0)


def find_tokenizer(reader: Reader, given: str | os.PathLike[str] | None) -> Tokenizer:
    """The tokenizer of a checkpoint: the one given, or else the one beside it.

    Raises:
      TokenizerError: The tokenizer is missing, unreadable, or larger than the vocabulary.
    """
    try:
        tokenizer = reader.load_tokenizer() if given is None else Tokenizer(expanded(given))
    except ValueError as error:
        raise error if isinstance(error, TokenizerError) else TokenizerError(str(error)) from error
    require_size(tokenizer, reader.config, given or reader.tokenizer)
    return tokenizer


def _notes(contents: Contents, stored: Layout) -> list[str]:
    family = family_of(contents.config)
    notes = (
        [] if family is None or contents.as_published else [*family.fields_note(contents.config)]
    )
    dense: dict[str, str] = {}  # what a model of ours quantises and this one does not
    for spec in stored.specs:
        if scheme_for(spec, contents.scheme) != stored.scheme_for(spec, contents.scheme):
            name = re.sub(r"^blocks\.\d+\.", "blocks.*.", spec.path)
            dense[name] = contents.dtypes[spec.path].name
    if dense:
        dtypes = " and ".join(sorted(set(dense.values())))
        what = "compressed-tensors holds linear layers of whole groups"
        notes.append(f"{what}: {dtypes} for {', '.join(dense)}")
    return notes


def _name(reader: Reader) -> str:
    """The name of the weights: as in the source, where that gives them a name.

    The name is made Unicode and not hidden, so that the weights are found again.
    """
    path = Path(os.path.abspath(reader.path))  # its last part is not ".."
    name = {Format.KAGGLE_FLAX: path.name, Format.KAGGLE_TORCH: path.stem}.get(reader.format, "")
    family = family_of(reader.config)
    released = family.release(reader.config) if family else "model"
    return os.fsencode(name).decode(errors="replace").lstrip(".") or released


def _nonfinite_message(path: Path, counts: dict[str, int]) -> str:
    listed = "\n  ".join(f"{name}: {count} values" for name, count in counts.items())
    return (
        f"{path} has NaN or infinity, or values beyond the new dtype (--allow-nonfinite keeps "
        f"them):\n  {listed}"
    )


def _require_folder_name(target: Path, force: bool) -> None:
    if target.suffix in (".pt", ".safetensors", ".gz"):
        raise DestinationError(f"the destination is a folder, got the name of a file: {target}")
    if (target.exists() or target.is_symlink()) and not force:
        raise DestinationError(f"{target} exists; pass force=True to replace it")


def _require_apart(target: Path, source: str | os.PathLike[str], reader: Reader) -> None:
    """Neither may hold the other, under any name; `reader` may have opened an unpacked archive."""
    for path in (checkpoint_path(source), reader.path, *reader.weights):
        if Path(os.path.realpath(path)).is_relative_to(target):
            raise DestinationError(f"the destination {target} must not hold the source {path}")
    if reader.path.is_dir() and target.is_relative_to(os.path.realpath(reader.path)):
        raise DestinationError(f"the destination {target} must not be in the source {reader.path}")
