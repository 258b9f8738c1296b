"""Readers and writers of RecurrentGemma checkpoints, one module a format."""

from recurrentgemma_conversion.convert import Progress, Summary, convert
from recurrentgemma_conversion.formats import Format
from recurrentgemma_conversion.opening import detect, open_checkpoint
from recurrentgemma_conversion.overrides import Overrides
from recurrentgemma_conversion.readers.base import Reader

__all__ = [
    "Format",
    "Overrides",
    "Progress",
    "Reader",
    "Summary",
    "convert",
    "detect",
    "open_checkpoint",
]
