"""A training step compiles once."""

from typing import Any

import numpy as np
import pytest
from cases import make_config
from sweeps import sweep

pytest.importorskip("flax.linen")
import jax

from recurrentgemma import jax as recurrentgemma
from recurrentgemma.jax.runtime.train_step import compiled

T = 8
BATCH = recurrentgemma.Batch(
    np.zeros((2, T), np.int32),
    np.broadcast_to(np.arange(T, dtype=np.int32), (2, T)),
    np.zeros((2, T), np.int32),
    np.ones((2, T), np.float32),
)


KINDS = [("adamw", None), ("adafactor", None), ("adamw", recurrentgemma.LoraOptions(2))]
# Parameters on a device are the harder case: what is made beside them is not on one.
CASES = [(*kind, place) for place in ("on a device", "anywhere") for kind in KINDS]


@pytest.mark.parametrize(("name", "lora", "place"), sweep(CASES[:4], CASES))
def test_one_compilation(name: str, lora: recurrentgemma.LoraOptions | None, place: str) -> None:
    config = make_config("R")
    params = recurrentgemma.init_params(config, 0)
    if place == "on a device":  # as `load_checkpoint` puts them
        params = jax.device_put(params, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    optimizer = recurrentgemma.OptimizerOptions(name=name)
    model = recurrentgemma.Griffin(config)
    state = recurrentgemma.create_train_state(model, params, optimizer=optimizer, lora=lora)
    update: Any = compiled(state.parameters, state.optimizer_state).update
    update.clear_cache()
    for _ in range(2):
        state, _ = recurrentgemma.train_step(state, BATCH)
    arrays = recurrentgemma.state_arrays(state)
    state, _ = recurrentgemma.train_step(state, BATCH)
    recurrentgemma.train_step(recurrentgemma.load_state_arrays(state, arrays), BATCH)
    assert update._cache_size() == 1
