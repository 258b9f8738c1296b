"""What the caller says of a model, where its checkpoint does not or says otherwise."""

from __future__ import annotations

from typing import Any, NamedTuple

from recurrentgemma.common.model.presets import Preset


class Overrides(NamedTuple):
    """Fields of a config that win over what a checkpoint says.

    Attributes:
      preset: The published model that it is.
      embeddings_scale_by_sqrt_dim: See `GriffinConfig`, as for the next two.
      attention_window_size: W, as published.
      logits_soft_cap: c.
      trained_in_transformers: The window that a folder of Hugging Face's states counts the query's
        own key, as in `transformers`; else it is as published.
      config: The whole config, in place of a `config.json`.
    """

    preset: Preset | None = None
    embeddings_scale_by_sqrt_dim: bool | None = None
    attention_window_size: int | None = None
    logits_soft_cap: float | None = None
    trained_in_transformers: bool = False
    config: Any = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that are given one by one."""
        given = self._asdict()
        del given["preset"], given["trained_in_transformers"], given["config"]
        return {name: value for name, value in given.items() if value is not None}


NO_OVERRIDES = Overrides()
