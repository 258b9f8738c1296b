"""RecurrentGemma (Griffin) and Gemma, native in JAX/Flax and in PyTorch, each declared once.

Import a twin: `from recurrentgemma import jax as recurrentgemma`, or `torch`.
This top level imports no framework.
"""

__version__ = "2.0.0"
