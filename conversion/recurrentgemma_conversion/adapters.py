"""The one way in for adapters on disk."""

from __future__ import annotations

import os

from recurrentgemma.common.errors import UnknownFormatError
from recurrentgemma.common.io.files import expanded
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.training.adapters import ADAPTERS, Adapters, read_adapters
from recurrentgemma_conversion.peft import PEFT_CONFIG, PEFT_WEIGHTS
from recurrentgemma_conversion.peft_reader import PEFT_PICKLE, read_peft


def open_adapters(path: str | os.PathLike[str], config: Config) -> Adapters:
    """Adapters on disk: a file of ours, a folder with one, or a folder of PEFT's.

    Args:
      path: The file or folder.
      config: The model that they must belong to.

    Raises:
      CheckpointError: The path holds no adapters, or another model's, or damaged ones.
    """
    path = expanded(path)
    folder = path.parent if path.name in (PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PICKLE) else path
    if (folder / PEFT_CONFIG).is_file():
        return read_peft(folder, config)
    if path.is_dir() and not (path / ADAPTERS).is_file():
        raise UnknownFormatError(
            f"no adapters at {path}: it has neither {ADAPTERS} nor PEFT's {PEFT_CONFIG}"
        )
    return read_adapters(path, config)
