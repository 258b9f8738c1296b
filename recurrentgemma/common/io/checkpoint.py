"""What a checkpoint folder of ours holds beside its weights.

A folder holds `config.json`, `model.safetensors` (or shards with an index; the tensors have the
names and axes of a PyTorch state dict) and `tokenizer.model` or `tokenizer.json`, which is read
only when asked for.

Where the matrices are quantised, `config.json` has a field `quantization`, and so has the header of
the weights. A quantised matrix `NAME` is rows of outputs under `NAME`, with `NAME.scale` and, in a
scheme of 4 bits, `NAME.zero` (`Quantized.parts`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from recurrentgemma.common.errors import ConfigError, TokenizerError
from recurrentgemma.common.io.arrays import float_dtype
from recurrentgemma.common.io.files import expanded
from recurrentgemma.common.model import families  # noqa: F401  # makes their configs known
from recurrentgemma.common.model.config import Config, config_from_dict, config_from_json
from recurrentgemma.common.quantization import require_scheme
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma.common.vocabulary import TOKENIZER_FILES

CONFIG = "config.json"
QUANTIZATION = "quantization"  # what the config and the header of quantised weights have besides
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
        return config_from_json(path.read_text(encoding="utf-8-sig"), beside=(QUANTIZATION,))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error


def config_of(fields: Mapping[str, Any], path: Path) -> Config:
    """The config among the fields of a file of ours; `ConfigError` when they hold none."""
    try:
        return config_from_dict({key: fields[key] for key in fields if key != QUANTIZATION})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


class Quantization(NamedTuple):
    """How the matrices of a checkpoint are quantised.

    Attributes:
      scheme: The name of the scheme (`common.quantization`).
      dtype: The name of the dtype that they were quantised from.
    """

    scheme: str
    dtype: str


def quantization_of(fields: Mapping[str, Any], path: Path) -> Quantization | None:
    """How the weights beside a config are quantised, if they are.

    Args:
      fields: The fields of the config.
      path: Its file, for messages.

    Raises:
      ConfigError: The scheme or the dtype is unknown.
    """
    stated = fields.get(QUANTIZATION)
    if stated is None:
        return None
    try:
        found = Quantization(**stated)
        require_scheme(found.scheme)
        float_dtype(found.dtype)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {QUANTIZATION} cannot be read: {error}") from error
    return found


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


def config_text(config: Config, quantization: Quantization | None = None) -> str:
    """What `config.json` holds."""
    if quantization is None:
        return config.to_json()
    fields = config.to_dict() | {QUANTIZATION: quantization._asdict()}
    return json.dumps(fields, indent=2) + "\n"


def metadata(config: Config, quantization: Quantization | None = None) -> dict[str, str]:
    """What a weights file says of itself."""
    said = {"format": "pt", "config": json.dumps(config.to_dict())}
    return said | ({QUANTIZATION: json.dumps(quantization._asdict())} if quantization else {})
