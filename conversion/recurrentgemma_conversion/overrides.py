"""The config of a checkpoint: from what it says of itself, its shapes, and what is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from recurrentgemma.common.errors import ConfigError
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.presets import Preset, member
from recurrentgemma_conversion.formats import Tensor


class Overrides(NamedTuple):
    """What the caller says of a model, where its checkpoint does not or says otherwise.

    Attributes:
      preset: The published model that it is.
      embeddings_scale_by_sqrt_dim: See `GriffinConfig`; so are the next two.
      attention_window_size: W, as published.
      logits_soft_cap: c.
    """

    preset: Preset | None = None
    embeddings_scale_by_sqrt_dim: bool | None = None
    attention_window_size: int | None = None
    logits_soft_cap: float | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that are given one by one."""
        given = self._asdict()
        del given["preset"]
        return {name: value for name, value in given.items() if value is not None}


NO_OVERRIDES = Overrides()
# For what does not depend on what the shapes do not tell.
ANY_MODEL = Overrides(None, True, 1, 0.0)


def resolve_config(
    path: Path,
    tensors: Mapping[str, Tensor],
    stated: GriffinConfig | None,
    overrides: Overrides,
) -> GriffinConfig:
    """The config of a checkpoint.

    Sizes come from what it states, or else from the shapes. The embedding scale, window and soft
    cap come from the overrides one by one, or else from the preset asked for, or what the
    checkpoint states, or the preset that has these shapes.

    Args:
      path: The checkpoint, for messages.
      tensors: Its tensors, by the names of Flax or of PyTorch.
      stated: The config that it has, if it has one.
      overrides: What the caller says.

    Raises:
      ConfigError: The preset contradicts the sizes (each is named), or something remains unknown.
    """
    try:
        if stated is None:
            empty = [name for name, tensor in tensors.items() if 0 in tensor.shape]
            if empty:
                raise ValueError(f"tensors must not be empty, got {', '.join(empty)}")
            stated = GriffinConfig.from_torch_params(tensors, overrides.preset, **overrides.fields)
        if overrides.preset is not None:
            name = member(Preset, overrides.preset).name
            preset = GriffinConfig.from_preset(name, stated.vocab_size)
            conflicts = [
                f"{field} is {here} in the checkpoint and {there} in the preset"
                for field, (here, there) in stated.differences(preset).items()
                if field not in Overrides._fields
            ]
            if conflicts:
                raise ValueError(f"this is not {name}: {'; '.join(conflicts)}")
            stated = dataclasses.replace(preset, scan_type=stated.scan_type)
        return dataclasses.replace(stated, **overrides.fields)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
