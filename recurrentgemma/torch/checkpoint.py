"""Loading and saving checkpoints."""

from __future__ import annotations

import os

import safetensors.torch
import torch

from recurrentgemma.common.checkpoint import metadata, open_folder, write_folder
from recurrentgemma.common.text import Tokenizer
from recurrentgemma.torch.griffin import Griffin


def load_checkpoint(
    path: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Griffin:
    """The model in a checkpoint folder.

    Args:
      path: The folder; the bundled model if None.
      dtype: Of the parameters and the computation; as stored if None.
      device: Where the parameters go.

    Raises:
      ValueError: The folder is no complete checkpoint; see `open_folder`.
    """
    folder = open_folder(path)
    state = safetensors.torch.load_file(folder.weights, device=str(device))
    model = Griffin(folder.config, device="meta")
    model.load_state_dict({name: value.to(dtype) for name, value in state.items()}, assign=True)
    return model


def save_checkpoint(
    path: str | os.PathLike[str], model: Griffin, tokenizer: Tokenizer, *, force: bool = False
) -> None:
    """Writes a checkpoint folder, whole or not at all.

    Raises:
      ValueError: `path` exists and `force` is not set.
    """
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    write_folder(
        path,
        model.config,
        lambda file: safetensors.torch.save_file(state, file, metadata(model.config)),
        tokenizer,
        force=force,
    )
