"""What a checkpoint folder of ours holds beside its weights.

A folder holds `config.json`, `model.safetensors` (or shards with an index; the tensors have the
names and axes of a PyTorch state dict) and `tokenizer.model` or `tokenizer.json`, which is read
only when asked for.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from recurrentgemma.common.errors import ConfigError, TokenizerError
from recurrentgemma.common.io.files import expanded
from recurrentgemma.common.model import families  # noqa: F401  # makes their configs known
from recurrentgemma.common.model.config import Config, config_from_json
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma.common.vocabulary import TOKENIZER_FILES

CONFIG = "config.json"
_ASSETS = Path(__file__).resolve().parents[2] / "assets"
BUNDLED = _ASSETS / "tiny"
BUNDLED_CHAT = _ASSETS / "tiny-chat"


def checkpoint_path(path: str | os.PathLike[str] | None = None) -> Path:
    """Where a checkpoint is.

    Args:
      path: The bundled model if None. "tiny" and "tiny-chat" name the bundled models, unless there
        is a file or folder of that name.
    """
    if path is None:
        return BUNDLED
    found = expanded(path)
    by_name = {bundled.name: bundled for bundled in (BUNDLED, BUNDLED_CHAT)}
    return found if os.path.lexists(found) else by_name.get(str(found), found)


def read_config(path: Path) -> Config:
    """The config in a file of ours; `ConfigError` when it holds none."""
    try:
        return config_from_json(path.read_text(encoding="utf-8-sig"))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error


def load_tokenizer(path: str | os.PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer in a checkpoint folder, or in a file of its own.

    Args:
      path: The folder or file; see `checkpoint_path`.

    Raises:
      ValueError: There is none.
    """
    return Tokenizer(checkpoint_path(path))


def no_tokenizer(path: Path) -> TokenizerError:
    """The error that a checkpoint has no tokenizer, with what to do."""
    return TokenizerError(
        f"there is no {' or '.join(TOKENIZER_FILES)} beside the weights in {path}: put the model's "
        "there, give it with --tokenizer, or write a checkpoint with it by recurrentgemma convert "
        "--tokenizer"
    )


def metadata(config: Config) -> dict[str, str]:
    """What a weights file says of itself."""
    return {"format": "pt", "config": json.dumps(config.to_dict())}
