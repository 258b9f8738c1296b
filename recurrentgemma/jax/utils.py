"""The published home of `load_parameters` and `save_parameters`, which live in `checkpoint`."""

from recurrentgemma.jax.checkpoint import load_parameters, save_parameters

__all__ = ["load_parameters", "save_parameters"]
