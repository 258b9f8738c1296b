"""Whether two models are one: every activation, state and gradient against what rounding gives."""

from recurrentgemma.parity.batches import Batch, default_length, make_batch
from recurrentgemma.parity.errors import Error, compare_tensors
from recurrentgemma.parity.models import JaxModel, Model, TorchModel, load_model
from recurrentgemma.parity.report import Report, Row, compare, require_same_config

__all__ = [
    "Batch",
    "Error",
    "JaxModel",
    "Model",
    "Report",
    "Row",
    "TorchModel",
    "compare",
    "compare_tensors",
    "default_length",
    "load_model",
    "make_batch",
    "require_same_config",
]
