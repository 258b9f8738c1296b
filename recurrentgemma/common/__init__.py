"""What both twins share; it imports no framework. The published names are at hand here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recurrentgemma.common.model.griffin import GriffinConfig
    from recurrentgemma.common.model.presets import Preset, ScanType, TemporalBlockType
    from recurrentgemma.common.tokenizer import apply_it_formatter

_HOMES = {
    "GriffinConfig": "model.griffin",
    "Preset": "model.presets",
    "ScanType": "model.presets",
    "TemporalBlockType": "model.presets",
    "apply_it_formatter": "tokenizer",
}
__all__ = ["GriffinConfig", "Preset", "ScanType", "TemporalBlockType", "apply_it_formatter"]


def __getattr__(name: str) -> Any:
    """Imports a published name when it is first asked for, since NumPy is slow to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
