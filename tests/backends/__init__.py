"""What tests need beyond `common.twin`: modules, scans and their gradients, over NumPy.

A behaviour test is written once and calls a backend. Arrays go in and come out as float64 and
int32; in between they have the dtype asked for. States are those of `common.model.reference`:
"blocks.N" to a mapping of arrays by field. A twin is imported when a test first uses it.
"""

from __future__ import annotations

from backends.base import Backend
from backends.jax import JaxBackend
from backends.torch import TorchBackend
from recurrentgemma.common.extras import is_installed

TWINS = ("jax", "torch")

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (JaxBackend(), TorchBackend())
    if is_installed(backend.name)
}
