"""Lowering for a GPU where there is none."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType


def gpu_mesh(axis_sizes: tuple[int, ...] = (), axis_names: tuple[str, ...] = ()) -> AbstractMesh:
    """A mesh that tells newer versions of JAX which GPU it is; older ones do not ask."""
    asks = jax.__version_info__ >= (0, 10)
    device = {"device_kind": "NVIDIA H200", "num_cores": None, "platform": "gpu"}
    return AbstractMesh(
        axis_sizes,
        axis_names,
        axis_types=(AxisType.Auto,) * len(axis_names),
        abstract_device=AbstractDevice(**device) if asks else None,
    )
