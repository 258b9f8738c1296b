"""Checkpoint folders as both twins read and write them: which files, which names, which errors.

A folder holds `config.json`, `model.safetensors` (tensors under their PyTorch names and axis
orders, as the layer spec gives them) and `tokenizer.model`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors

from recurrentgemma.common.config import GriffinConfig
from recurrentgemma.common.layer_spec import layer_spec, require_match
from recurrentgemma.common.text import Tokenizer

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.model"
BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "tiny"


class CheckpointFolder(NamedTuple):
    """A folder that has been checked, its weights not yet read.

    Attributes:
      path: The folder.
      config: What the model is.
      shapes: Shape of each tensor by its stored name.
      dtypes: safetensors' name of each tensor's dtype ("BF16", "F32", ...).
    """

    path: Path
    config: GriffinConfig
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    @property
    def weights(self) -> Path:
        """The file of the weights."""
        return self.path / WEIGHTS

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read now."""
        return Tokenizer(self.path / TOKENIZER)


def open_folder(path: str | os.PathLike[str] | None = None) -> CheckpointFolder:
    """Checks a checkpoint folder, reading its config and the header of its weights.

    Args:
      path: The folder; the bundled model if None.

    Raises:
      ValueError: Files are missing (all are named), unreadable, or the weights' names and shapes
        are not the config's (every difference is named).
    """
    folder = BUNDLED if path is None else Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"no checkpoint folder at {folder}")
    missing = [name for name in (CONFIG, WEIGHTS, TOKENIZER) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"the checkpoint folder {folder} lacks {', '.join(missing)}")
    try:
        config = GriffinConfig.from_json((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    try:
        with safetensors.safe_open(folder / WEIGHTS, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is no complete safetensors file: {error}") from error
    try:
        require_match({spec.torch.name: spec.torch.shape for spec in layer_spec(config)}, shapes)
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS}: {error}") from error
    return CheckpointFolder(folder, config, shapes, dtypes)


def load_tokenizer(path: str | os.PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer in a checkpoint folder, or in a sentencepiece model file.

    Args:
      path: The folder or file; the bundled model's if None.

    Raises:
      ValueError: There is none.
    """
    found = BUNDLED if path is None else Path(path).expanduser()
    return Tokenizer(found / TOKENIZER if found.is_dir() else found)


def write_folder(
    path: str | os.PathLike[str],
    config: GriffinConfig,
    save_weights: Callable[[Path], None],
    tokenizer: Tokenizer,
    *,
    force: bool = False,
) -> None:
    """Writes a checkpoint folder: whole, or not at all.

    Args:
      path: The folder to make.
      config: What the model is.
      save_weights: Writes the weights to the file it is given.
      tokenizer: The tokenizer.
      force: Whether to replace what is at `path`.

    Raises:
      ValueError: `path` exists and `force` is not set.
    """
    folder = Path(path).expanduser().absolute()
    if folder.exists() and not force:
        raise ValueError(f"{folder} exists; pass force=True to replace it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_weights(temporary / WEIGHTS)
        (temporary / CONFIG).write_text(config.to_json(), encoding="utf-8")
        (temporary / TOKENIZER).write_bytes(tokenizer.vocab.serialized_model_proto())
        for written in temporary.iterdir():
            written.chmod(0o644)
        temporary.chmod(0o755)
        if folder.exists():
            old = temporary.with_name(temporary.name + ".old")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def metadata(config: GriffinConfig) -> dict[str, str]:
    """What a weights file says of itself."""
    return {"format": "pt", "config": json.dumps(config.to_dict())}
