"""Schedules, weight decay, and the optimisers against their definitions."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from cases import CONFIGS, make_config, make_params
from trainers import Trainer, make_batch

from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.state_dict import to_torch
from recurrentgemma.common.training.lora import LoraOptions, trainable_specs
from recurrentgemma.common.training.optimization import (
    OptimizerOptions,
    decay_mask,
    learning_rate,
    state_shapes,
)
from tolerances import assert_close

OPTIMIZERS = {
    "adamw": OptimizerOptions("adamw", 1e-2, 0.1, b2=0.96, clip_norm=None),
    "sgd": OptimizerOptions("sgd", 1e-2, 0.1, clip_norm=None),
    "momentum": OptimizerOptions("sgd", 1e-2, 0.1, momentum=0.9, clip_norm=None),
    "adafactor": OptimizerOptions("adafactor", 1e-2, 0.1, clip_norm=None),
    "adafactor_capped": OptimizerOptions("adafactor", 0.9, 0.01, clip_norm=None),
}


def test_warm_up_then_cosine() -> None:
    options = OptimizerOptions(
        learning_rate=2.0, warmup_steps=4, total_steps=12, final_fraction=0.1
    )
    rates = [learning_rate(options, step) for step in range(16)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert rates[6] == pytest.approx(2 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert rates[12:] == pytest.approx([0.2] * 4)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_without_an_end_the_rate_stays() -> None:
    options = OptimizerOptions(learning_rate=2.0, warmup_steps=2)
    assert [learning_rate(options, step) for step in (0, 1, 2, 1000)] == [1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, "name must be one of adamw, sgd, adafactor, got 'adam'"),
        ({"learning_rate": 0}, "learning_rate must be positive, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"clip_norm": -1.0}, "clip_norm must be positive"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, "b2 must be in"),
        ({"momentum": 1.5}, "momentum must be in"),
        ({"final_fraction": 1.1}, r"final_fraction must be in \[0, 1\]"),
        ({"warmup_steps": 5, "total_steps": 5}, "total_steps must be more than warmup_steps"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerOptions(**changes)


def test_what_decays() -> None:
    """Kernels and the convolution's taps decay, nothing else."""
    leaves = {True: set(), False: set()}
    for path, decays in decay_mask(layer_spec(make_config())).items():
        leaves[decays].add(".".join(path.split(".")[-2:]))
    assert leaves[True] == {
        *(f"proj_{name}.kernel" for name in ("q", "k", "v", "final")),
        *(f"linear_{name}.kernel" for name in ("x", "y", "out")),
        "conv_1d.w",
        "ffw_up.w",
        "ffw_down.kernel",
    }
    assert {path.split(".")[-1] for path in leaves[False]} == {
        *("bias", "b", "scale", "a_param", "input_embedding"),
        "w",  # of gates
    }


def test_adapters_decay_as_their_targets() -> None:
    lora = LoraOptions(targets=("mlp", "gates"))
    mask = decay_mask(trainable_specs(make_config(), lora))
    assert all(decays == ("mlp_block" in path) for path, decays in mask.items())
    assert set(mask.values()) == {True, False}


def defined(options: OptimizerOptions, decays: bool):
    """The optimiser of one parameter in NumPy, by `OptimizerOptions`: (p, g, n) -> p."""
    rate, decay = options.learning_rate, options.weight_decay * decays
    state: dict[str, Any] = {}

    def average(name: str, value: np.ndarray, share: float) -> np.ndarray:
        state[name] = (1 - share) * state.get(name, 0.0) + share * value
        return state[name]

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(x**2)))

    def adamw(p, g, n):
        m = average("m", g, 1 - options.b1) / (1 - options.b1**n)
        v = average("v", g**2, 1 - options.b2) / (1 - options.b2**n)
        return (1 - rate * decay) * p - rate * m / (np.sqrt(v) + options.eps)

    def sgd(p, g, n):
        del n
        state["m"] = options.momentum * state.get("m", 0.0) + g + decay * p
        return p - rate * state["m"]

    def adafactor(p, g, n):
        if p.ndim == 1:
            v = average("v", g**2, n**-0.8)
        else:
            rows = average("rows", (g**2).mean(-1, keepdims=True), n**-0.8)
            columns = average("columns", (g**2).mean(-2, keepdims=True), n**-0.8)
            v = rows * columns / rows.mean(-2, keepdims=True)
        u = g / np.sqrt(v)
        step = min(rate, n**-0.5) * max(rms(p), 1e-3) / max(1.0, rms(u))
        return (1 - rate * decay) * p - step * u

    return {"adamw": adamw, "sgd": sgd, "adafactor": adafactor}[options.name]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_its_definition(trainer: Trainer, name: str) -> None:
    """Three steps in float64, on gradients that do not depend on the parameters."""
    options = OPTIMIZERS[name]
    config = make_config("RA", num_heads=6)  # gates whose largest axes are not the last
    params = make_params(config)
    specs = trainable_specs(config, None)
    rng = np.random.default_rng(0)
    gradients = [{s.path: rng.standard_normal(s.shape) for s in specs} for _ in range(3)]
    expected = {}
    for spec in specs:
        step, value = defined(options, spec.decay), params[spec.path]
        for n, grads in enumerate(gradients, 1):
            value = step(value, grads[spec.path], n)
        expected[spec.path] = value
    # In every state dtype, optax computes Adam's bias correction and Adafactor's share in float32.
    dtype = "float64" if options.name == "sgd" else "float32"
    actual = run_optimizer(trainer, options, config, params, gradients)
    for path, value in expected.items():
        assert_close(actual[path], value, "gradient", dtype, name=path)


def run_optimizer(trainer: Trainer, options, config, params, gradients) -> dict[str, np.ndarray]:
    specs = trainable_specs(config, None)
    mask = decay_mask(specs)
    with trainer.precision("float64"):
        if trainer.name == "jax":
            import jax
            import optax

            from recurrentgemma.jax.optimizer import make_optimizer

            values: Any = {s.path: trainer.backend.array(params[s.path], "float64") for s in specs}
            optimizer = make_optimizer(options, mask, options.learning_rate)
            state = jax.jit(optimizer.init)(values)

            @jax.jit
            def step(arrays, state, values):
                updates, state = optimizer.update(arrays, state, values)
                return optax.apply_updates(values, updates), state

            for grads in gradients:
                arrays = {path: trainer.backend.array(g, "float64") for path, g in grads.items()}
                values, state = step(arrays, state, values)
            return {path: np.asarray(value) for path, value in values.items()}
        from recurrentgemma.torch.optimizer import make_optimizer

        values = {
            s.path: trainer.backend.array(to_torch(s.path, params[s.path]), "float64")
            for s in specs
        }
        optimizer = make_optimizer(options, mask, values)
        for grads in gradients:
            for spec in specs:
                grad = trainer.backend.array(to_torch(spec.path, grads[spec.path]), "float64")
                values[spec.path].grad = grad
            optimizer.step()
        return {s.path: to_torch(s.path, values[s.path].numpy()) for s in specs}


GATES = LoraOptions(rank=2, targets=("gates", "mlp"))


@pytest.mark.parametrize(
    ("name", "lora"),
    [("adamw", None), ("momentum", None), ("adafactor", None), ("adafactor", GATES)],
)
def test_the_state_of_both_twins(
    trainers: tuple[Trainer, Trainer], name: str, lora: LoraOptions | None
) -> None:
    """Names, shapes and, after three steps, values are the same; each goes on with the other's."""
    config = CONFIGS["attention_last"]
    batches = [make_batch(config, seed) for seed in range(5)]

    def fresh(trainer: Trainer) -> Any:
        return trainer.state(
            config,
            make_params(config),
            dtype="float64",
            state_dtype="float64",
            optimizer=OPTIMIZERS[name],
            lora=lora,
        )

    arrays, losses = [], []
    for trainer in trainers:
        with trainer.precision("float64"):
            state, _ = trainer.steps(fresh(trainer), batches[:3])
            saved = trainer.module.state_arrays(state)
            arrays.append({path: array.copy() for path, array in saved.items()})
            losses.append(trainer.steps(state, batches[3:])[1]["loss"])
    for trainer, saved, expected in zip(trainers, arrays[::-1], losses[::-1], strict=True):
        with trainer.precision("float64"):
            state = trainer.module.load_state_arrays(fresh(trainer), saved)
            actual = trainer.steps(state, batches[3:])[1]["loss"]
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    expected = state_shapes(OPTIMIZERS[name], trainable_specs(config, lora))
    for given in arrays:
        assert {path: array.shape for path, array in given.items()} == expected
        assert given["step"] == 3
    one, other = arrays
    dtype = "float64" if OPTIMIZERS[name].name == "sgd" else "float32"  # as above
    assert list(one) == list(other)
    for path in one:
        assert_close(one[path], other[path], "gradient", dtype, name=path)


def test_what_clips(trainer: Trainer) -> None:
    """SGD's update is the learning rate times the gradient, scaled to the given norm."""
    config = make_config("R")
    batch = make_batch(config, 0)
    options = OptimizerOptions("sgd", 0.5, clip_norm=None)
    moved = {}
    for clip_norm in (None, 0.25, 1e6):
        optimizer = dataclasses.replace(options, clip_norm=clip_norm)
        state = trainer.state(config, make_params(config), optimizer=optimizer)
        before = trainer.parameters(state)
        before = {path: value.copy() for path, value in before.items()}
        state, metrics = trainer.steps(state, [batch])
        after = trainer.parameters(state)
        squares = sum(((after[path] - before[path]) ** 2).sum() for path in before)
        moved[clip_norm] = (float(metrics["grad_norm"][0]), math.sqrt(squares) / 0.5)
    norm, free = moved[None]
    assert norm > 0.5
    assert free == pytest.approx(norm, rel=1e-4)
    assert moved[0.25] == (norm, pytest.approx(0.25, rel=1e-4))
    assert moved[1e6] == moved[None]
