"""The config that our writers put beside formats that have none."""

from __future__ import annotations

import json
from pathlib import Path

from recurrentgemma.common.checkpoint import CONFIG, read_config
from recurrentgemma.common.config import GriffinConfig


def stated_config(folder: Path) -> GriffinConfig | None:
    """Our config in the folder of the weights, if there is one.

    Raises:
      ConfigError: There is a `config.json` that cannot be read.
    """
    path = folder / CONFIG
    if not path.is_file() or _is_huggingface(path):
        return None
    return read_config(path)


def _is_huggingface(path: Path) -> bool:
    try:
        return "model_type" in json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, RecursionError):
        return False
