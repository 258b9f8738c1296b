"""Any optimiser of Optax, and any of `torch.optim`, in the place of our options."""

import functools
from typing import Any

import numpy as np
import pytest
from cases import make_config, make_params
from trainers import Trainer, make_batch

from recurrentgemma.common.training.lora import trainable_specs
from recurrentgemma.common.training.optimization import OptimizerOptions, decay_mask

CONFIG = make_config("R")
BATCHES = [make_batch(CONFIG, 0)] * 4
ADAMW = OptimizerOptions("adamw", 1e-2, 0.0, clip_norm=None)


@functools.cache
def make(twin: str, name: str) -> Any:
    """An optimiser; made once, since JAX compiles a step for each."""
    if twin == "jax":
        import optax

        schedule = optax.linear_schedule(2e-3, 1e-3, 4)
        noise, plateau = optax.add_noise(1e-6, 0.5, key=0), optax.contrib.reduce_on_plateau()
        return {
            "adamw": optax.inject_hyperparams(optax.adamw)(1e-2, weight_decay=0.0),
            "keys and the loss": optax.chain(noise, optax.lion(schedule), plateau),
            "shared arrays": optax.contrib.schedule_free_sgd(1e-1),
        }[name]
    import torch

    return {
        "adamw": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0),
        "keys and the loss": functools.partial(torch.optim.LBFGS, max_iter=2),
        "shared arrays": lambda tensors: torch.optim.NAdam(
            [{"params": [t for t in tensors if (t.ndim > 1) == many]} for many in (True, False)],
            lr=torch.tensor(1e-2),
        ),
    }[name]


def fresh(trainer: Trainer, name: str) -> Any:
    return trainer.state(CONFIG, make_params(CONFIG), optimizer=make(trainer.name, name))


@pytest.mark.parametrize("name", ["adamw", "keys and the loss", "shared arrays"])
def test_trains_and_resumes(trainer: Trainer, name: str) -> None:
    """The loss falls, and a run from saved arrays has the bits of the uninterrupted one."""
    state, metrics = trainer.steps(fresh(trainer, name), BATCHES[:2])
    assert metrics["loss"][1] < metrics["loss"][0]
    if (trainer.name, name) == ("torch", "keys and the loss"):
        with pytest.raises(ValueError, match="state of LBFGS is no set of tensors"):
            trainer.module.state_arrays(state)
        return
    saved = {name: np.array(array) for name, array in trainer.module.state_arrays(state).items()}
    assert any(key.startswith("optimizer.") for key in saved)
    state, _ = trainer.steps(state, BATCHES[2:])
    again = trainer.module.load_state_arrays(fresh(trainer, name), saved)
    assert again.step == 2
    again, _ = trainer.steps(again, BATCHES[2:])
    one, other = map(trainer.module.state_arrays, (state, again))
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_adamw_of_the_framework_is_ours(trainer: Trainer) -> None:
    """The same losses and learning rate as with the options."""
    options = trainer.state(CONFIG, make_params(CONFIG), optimizer=ADAMW)
    _, expected = trainer.steps(options, BATCHES[:3])
    _, given = trainer.steps(fresh(trainer, "adamw"), BATCHES[:3])
    np.testing.assert_allclose(given["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(given["learning_rate"], 1e-2, rtol=1e-6)


def test_a_scheduler_of_torch_goes_on(trainer: Trainer) -> None:
    """A scheduler's learning rate is part of the saved state."""
    if trainer.name == "jax":
        pytest.skip("a schedule is part of an Optax transformation")
    import torch

    rates = []
    state = fresh(trainer, "adamw")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(state.optimizer_state, 0.5)
    for batch in BATCHES[:2]:
        state, metrics = trainer.module.train_step(state, batch)
        scheduler.step()
        rates.append(metrics["learning_rate"])
    assert rates == [1e-2, 5e-3]
    again = trainer.module.load_state_arrays(
        fresh(trainer, "adamw"), trainer.module.state_arrays(state)
    )
    assert again.optimizer_state.param_groups[0]["lr"] == 2.5e-3
    assert again.optimizer_state.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_mask_by_path(trainer: Trainer) -> None:
    """Tensors come in the order of the layer spec, so that a mask by path fits them."""
    decays = decay_mask(trainable_specs(CONFIG, None))
    if trainer.name == "jax":
        import optax

        masked = optax.masked(optax.sgd(0.0), decays)
        state = trainer.state(CONFIG, make_params(CONFIG), optimizer=masked)
        assert list(state.parameters) == list(decays)
        return
    import torch

    seen = []

    def made(tensors):
        seen.extend(tensors)
        return torch.optim.SGD(tensors, 0.0)

    state = trainer.state(CONFIG, make_params(CONFIG), optimizer=made)
    assert list(state.parameters) == list(decays)
    assert all(one is other for one, other in zip(seen, state.parameters.values(), strict=True))


def test_what_is_no_optimiser(trainer: Trainer, unchecked_types) -> None:
    if trainer.name == "jax":
        import optax

        wrong: list[Any] = [1e-3, "adam", optax.adamw, lambda params: params]
    else:
        import torch

        tensor = torch.zeros(2, requires_grad=True)
        wrong = [1e-3, "adam", torch.optim.SGD([tensor]), lambda tensors: tensors,
                 lambda tensors: torch.optim.SGD([tensor])]  # fmt: skip
    for optimizer in wrong:
        with pytest.raises(ValueError, match="optimizer must be"):
            trainer.state(CONFIG, make_params(CONFIG), optimizer=optimizer)


def test_arrays_of_another_optimiser(trainer: Trainer) -> None:
    """Every difference is named, and nothing changes."""
    saved = dict(trainer.module.state_arrays(fresh(trainer, "adamw")))
    with pytest.raises(ValueError, match="unexpected optimizer"):
        trainer.module.load_state_arrays(
            trainer.state(CONFIG, make_params(CONFIG), optimizer=ADAMW), saved
        )
    saved["optimizer.nothing.like.it"] = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=r"nothing\.like\.it"):
        trainer.module.load_state_arrays(fresh(trainer, "adamw"), saved)
