"""What runs on eight devices, and training on them that is compared with training on one."""

from typing import Any

import numpy as np

# The number of devices is fixed when JAX starts.
EIGHT_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
"""
MESHES = ("data=8", "fsdp=8", "tensor=4", "sequence=8", "fsdp=2,sequence=4", "fsdp=2,tensor=4")
METHODS = ("adamw", "sgd", "adafactor", "lora", "lora on int8")
BATCHES = ("packed", "padded")


def mesh_config(**changes: Any) -> Any:
    """A small model that all of `MESHES` fit; R A comes twice."""
    from cases import make_config

    sizes = {"vocab_size": 256, "width": 64, "mlp_expanded_width": 128, "num_heads": 4}
    return make_config("RARA", **sizes | {"logits_soft_cap": 30.0} | changes)


def make_batch(kind: str, seed: int, vocab_size: int = 256) -> Any:
    """Eight rows: some hold two documents, or some begin with padding."""
    from recurrentgemma.common.training.batch import Batch

    rng = np.random.default_rng(seed)
    tokens = rng.integers(vocab_size, size=(8, 24))
    positions = np.tile(np.arange(24), (8, 1))
    for row in range(0, 8, 3):
        first = 3 + row
        if kind == "packed":
            positions[row, first:] = np.arange(24 - first)
        else:
            positions[row] = np.arange(24) - first
    positions = positions.clip(min=-1)
    weights = (positions >= 0) * rng.uniform(0.5, 1, size=(8, 24))
    return Batch(tokens, positions, np.roll(tokens, -1, 1), weights)


def trained(method: str, kind: str, mesh: str | None, steps: int = 3) -> Any:
    """The state and the last metrics after some steps in float64, on a mesh or one device."""
    from recurrentgemma.common.training.lora import LoraOptions
    from recurrentgemma.common.training.optimization import OptimizerOptions
    from recurrentgemma.jax import Model, init_params, make_mesh
    from recurrentgemma.jax.training import create_train_state, train_step

    name, _, base = method.partition(" on ")
    lora = LoraOptions(rank=4, quantize=bool(base)) if name == "lora" else None
    options: dict[str, Any] = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = OptimizerOptions(
        "adamw" if lora else name, learning_rate=1e-2, weight_decay=0.1, **options
    )
    made = None if mesh is None else make_mesh(mesh)
    config = mesh_config()
    params = init_params(config, 0, "float64", mesh=made)
    state = create_train_state(
        Model(config, False, mesh=made),
        params,
        optimizer=optimizer,
        lora=lora,
        state_dtype="float64",
    )
    metrics: Any = {}
    for step in range(steps):
        state, metrics = train_step(state, [make_batch(kind, 2 * step + i) for i in range(2)])
    return state, metrics


def difference(one: Any, other: Any) -> float:
    """The largest relative difference between two trained states, their losses and norms."""
    import jax

    pairs = list(zip(*map(jax.tree.leaves, (_arrays(*one), _arrays(*other))), strict=True))
    return max(float(np.max(np.abs(a - b)) / max(1.0, float(np.max(np.abs(b))))) for a, b in pairs)


def _arrays(state: Any, metrics: Any) -> Any:
    from recurrentgemma.jax.training import state_arrays

    return state_arrays(state), {name: np.asarray(value) for name, value in metrics.items()}
