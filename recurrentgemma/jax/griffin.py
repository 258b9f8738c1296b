"""The published place and name of the model."""

from recurrentgemma.jax import modules as modules  # published code reads griffin.modules
from recurrentgemma.jax.model import Model as Griffin

__all__ = ["Griffin"]
