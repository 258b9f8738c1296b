"""One adapter per twin: the same methods over NumPy, so that a behaviour test is written once.

Arrays go in as float64 and int32 and come out so; in between they have the dtype asked for. States
are what `common.reference` takes and returns: mappings of arrays, "blocks.N" of a field. A twin is
imported when it is first asked for something.
"""

from __future__ import annotations

import importlib.util

from backends.base import Backend
from backends.jax import JaxBackend
from backends.torch import TorchBackend

TWINS = ("jax", "torch")


def _is_installed(framework: str) -> bool:
    spec = importlib.util.find_spec(framework)
    # Else the folders tests/jax and tests/torch would do as packages without an __init__.
    return spec is not None and spec.origin is not None


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (JaxBackend(), TorchBackend())
    if _is_installed(backend.name)
}
