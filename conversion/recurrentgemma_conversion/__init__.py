"""Readers and writers of RecurrentGemma checkpoints, one module a format."""

from recurrentgemma_conversion.convert import Step, Summary, convert
from recurrentgemma_conversion.formats import Format, Reader
from recurrentgemma_conversion.opening import detect, open_checkpoint
from recurrentgemma_conversion.overrides import Overrides

__all__ = [
    "Format",
    "Overrides",
    "Reader",
    "Step",
    "Summary",
    "convert",
    "detect",
    "open_checkpoint",
]
