"""RecurrentGemma (Griffin), native in JAX/Flax and in PyTorch, from one declaration of the model.

Import a twin: `from recurrentgemma import jax as recurrentgemma`, or `torch`.
This top level imports no framework.
"""

__version__ = "2.0.0"
