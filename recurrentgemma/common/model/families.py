"""The model families. Importing this module makes the configs of all of them known."""

from __future__ import annotations

from recurrentgemma.common.model import gemma, griffin  # noqa: F401  # makes their configs known
from recurrentgemma.common.model.config import Config, config_from_dict
from recurrentgemma.common.model.presets import Preset, member


def config_from_preset(preset: Preset | str, vocab_size: int | None = None) -> Config:
    """The configuration of a published model of any family.

    Args:
      preset: A `Preset` or its name.
      vocab_size: Number of tokens; the preset's own if None.

    Raises:
      ValueError: The preset is unknown.
    """
    known = member(Preset, preset)
    size = known.vocab_size if vocab_size is None else vocab_size
    return config_from_dict({"vocab_size": size, **known.config_dict})
