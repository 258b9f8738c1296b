"""What both twins share; it imports no framework. The published names are at hand here."""

from typing import TYPE_CHECKING

from recurrentgemma.common.published import elsewhere

if TYPE_CHECKING:
    from recurrentgemma.common.model.griffin import GriffinConfig
    from recurrentgemma.common.model.presets import Preset, ScanType, TemporalBlockType
    from recurrentgemma.common.tokenizer import apply_it_formatter

_PRESETS = "recurrentgemma.common.model.presets"
__all__ = ["GriffinConfig", "Preset", "ScanType", "TemporalBlockType", "apply_it_formatter"]
__getattr__ = elsewhere(
    __name__,
    {
        "GriffinConfig": "recurrentgemma.common.model.griffin",
        "apply_it_formatter": "recurrentgemma.common.tokenizer",
    }
    | dict.fromkeys(["Preset", "ScanType", "TemporalBlockType"], _PRESETS),
)
