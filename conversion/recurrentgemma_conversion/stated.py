"""The config that our writers put beside formats that have none."""

from __future__ import annotations

import json
from pathlib import Path

from recurrentgemma.common.io.checkpoint import CONFIG, read_config
from recurrentgemma.common.model.griffin import GriffinConfig


def around(weights: Path) -> list[Path]:
    """The folders that weights are in: by their name and, where it is a link, by what it names."""
    return list(dict.fromkeys((weights.parent, weights.resolve().parent)))


def stated_config(weights: Path) -> GriffinConfig | None:
    """Our config beside the weights, if there is one.

    Raises:
      ConfigError: There is a `config.json` that cannot be read.
    """
    for folder in around(weights):
        path = folder / CONFIG
        if path.is_file() and not _is_huggingface(path):
            return read_config(path)
    return None


def _is_huggingface(path: Path) -> bool:
    try:
        return "model_type" in json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, RecursionError):
        return False
