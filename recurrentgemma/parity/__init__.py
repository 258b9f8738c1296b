"""The comparison of two models: every activation, state and gradient, within rounding."""

from recurrentgemma.parity.batches import ParityBatch, default_length, make_batch
from recurrentgemma.parity.budget import Error, compare_tensors
from recurrentgemma.parity.models import ComparedModel, TwinModel, load_model
from recurrentgemma.parity.report import Report, Row, compare, require_same_config

__all__ = [
    "ComparedModel",
    "Error",
    "ParityBatch",
    "Report",
    "Row",
    "TwinModel",
    "compare",
    "compare_tensors",
    "default_length",
    "load_model",
    "make_batch",
    "require_same_config",
]
