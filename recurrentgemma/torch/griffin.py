"""The published place and name of the model."""

from recurrentgemma.torch import modules as modules  # published code reads griffin.modules
from recurrentgemma.torch.model import Model as Griffin

__all__ = ["Griffin"]
