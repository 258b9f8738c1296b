"""Training steps: the twins against each other, and the promises of a step."""

import math
from typing import Any

import numpy as np
import pytest
from cases import CONFIGS, make_config, make_params
from sweeps import sweep
from trainers import Trainer, make_batch

from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.training.batch import Batch
from recurrentgemma.common.training.optimization import OptimizerOptions
from tolerances import assert_close

CONFIG = CONFIGS["attention_last"]  # two blocks: quick to compile
SMALL = make_config("R")  # where an optimizer is tested, and no layer
PLAIN = OptimizerOptions(learning_rate=1e-2)
ADAMW = OptimizerOptions(learning_rate=1e-2, weight_decay=0.1, warmup_steps=2, total_steps=10)


def batches(count: int, config: GriffinConfig = CONFIG) -> list[Batch]:
    return [make_batch(config, seed) for seed in range(count)]


def test_many_steps_are_the_same_in_both(trainers: tuple[Trainer, Trainer]) -> None:
    config = sweep(make_config("RA"), CONFIGS["griffin"])
    optimizer = OptimizerOptions(
        learning_rate=3e-3, weight_decay=0.1, warmup_steps=10, total_steps=100
    )
    curves = []
    for trainer in trainers:
        state = trainer.state(config, make_params(config), optimizer=optimizer)
        _, metrics = trainer.steps(state, batches(sweep(40, 100), config))
        curves.append(metrics)
    one, other = curves
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-4)
    np.testing.assert_array_equal(one["learning_rate"], other["learning_rate"])
    np.testing.assert_array_equal(one["tokens"], other["tokens"])
    assert one["loss"][-10:].mean() < 0.8 * one["loss"][:10].mean()


def test_accumulation_is_one_large_batch(trainer: Trainer) -> None:
    """Batches have unequal weights, and one has none."""
    together = make_batch(CONFIG, 0)
    together = together._replace(weights=together.weights * np.array([[1], [0.5], [0]], np.float32))
    rows = [Batch(*(array[row : row + 1] for array in together)) for row in range(3)]
    results = []
    for given in (rows, together):
        with trainer.precision("float64"):
            kwargs: Any = {"dtype": "float64", "state_dtype": "float64", "optimizer": ADAMW}
            state = trainer.state(CONFIG, make_params(CONFIG), **kwargs)
            state, metrics = trainer.steps(state, [given])
            results.append((trainer.module.state_arrays(state), metrics))
    (one, one_metrics), (other, other_metrics) = results
    assert_close(one_metrics["loss"], other_metrics["loss"], "output", "float64")
    assert_close(one_metrics["grad_norm"], other_metrics["grad_norm"], "output", "float64")
    assert one_metrics["tokens"] == together.weights.sum()
    for name in one:
        assert_close(one[name], other[name], "gradient", "float64", name=name)


def test_where_nothing_counts_nothing_moves(trainer: Trainer) -> None:
    batch = make_batch(CONFIG, 0)
    batch = batch._replace(weights=0 * batch.weights)
    state = trainer.state(CONFIG, make_params(CONFIG), optimizer=PLAIN)
    before = {path: value.copy() for path, value in trainer.parameters(state).items()}
    state, metrics = trainer.steps(state, [batch])
    assert metrics["loss"] == metrics["tokens"] == metrics["grad_norm"] == 0
    for path, value in trainer.parameters(state).items():
        np.testing.assert_array_equal(value, before[path])


def test_weights_may_be_wider_than_the_model(trainer: Trainer) -> None:
    """NumPy's own dtype, in a program that computes in float64 elsewhere."""
    losses = []
    for dtype in (np.float32, np.float64):
        batch = make_batch(SMALL, 0)
        batch = batch._replace(weights=batch.weights.astype(dtype))
        with trainer.precision("float64"):
            state = trainer.state(SMALL, make_params(SMALL), optimizer=PLAIN)
            _, metrics = trainer.steps(state, [batch])
        losses.append(metrics["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_the_same_run_again_is_the_same(trainer: Trainer) -> None:
    runs = []
    for _ in range(2):
        state = trainer.state(CONFIG, make_params(CONFIG), optimizer=ADAMW)
        state, metrics = trainer.steps(state, batches(4))
        runs.append((trainer.module.state_arrays(state), metrics["loss"]))
    (one, losses), (other, again) = runs
    np.testing.assert_array_equal(losses, again)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("done", [0, 3])
def test_going_on_from_arrays(trainer: Trainer, done: int, dtype: str) -> None:
    """A restored run equals the uninterrupted one bit for bit, with a wide state and without."""
    data = batches(5)

    def fresh():
        return trainer.state(CONFIG, make_params(CONFIG), dtype=dtype, optimizer=ADAMW)

    whole, _ = trainer.steps(fresh(), data)
    expected = trainer.module.state_arrays(whole)
    state = fresh()
    if done:
        state, _ = trainer.steps(state, data[:done])
    saved = {name: array.copy() for name, array in trainer.module.state_arrays(state).items()}
    other, _ = trainer.steps(fresh(), data[:1])  # the loaded arrays replace all of it
    state = trainer.module.load_state_arrays(other, saved)
    assert state.step == done
    state, _ = trainer.steps(state, data[done:])
    for name, array in trainer.module.state_arrays(state).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_arrays_of_another_state(trainer: Trainer) -> None:
    state = trainer.state(CONFIG, make_params(CONFIG), optimizer=ADAMW)
    arrays = dict(trainer.module.state_arrays(state))
    arrays.pop("mu.final_norm.scale")
    arrays["nu.final_norm.scale"] = np.zeros(3)
    arrays["momentum.final_norm.scale"] = np.zeros(3)
    with pytest.raises(ValueError, match="3 differences") as caught:
        trainer.module.load_state_arrays(state, arrays)
    for name in ("mu", "nu", "momentum"):
        assert f"{name}.final_norm.scale" in str(caught.value)


def test_a_wide_state_keeps_small_updates(trainer: Trainer) -> None:
    """A float32 state keeps updates below a bfloat16 parameter's last digit; a bfloat16 one not."""
    optimizer = OptimizerOptions("sgd", 1e-5, clip_norm=None)
    batch = make_batch(SMALL, 0)
    moved = {}
    for state_dtype in ("float32", "bfloat16"):
        state = trainer.state(
            SMALL, make_params(SMALL), dtype="bfloat16", state_dtype=state_dtype,
            optimizer=optimizer,
        )  # fmt: skip
        before = trainer.module.state_arrays(state)["parameters.embedder.input_embedding"].copy()
        state, _ = trainer.steps(state, [batch])
        after = trainer.module.state_arrays(state)["parameters.embedder.input_embedding"]
        assert after.dtype == state_dtype
        moved[state_dtype] = np.mean(after != before)
        assert trainer.parameters(state)["embedder.input_embedding"].dtype == np.float64
    assert moved["float32"] > 0.9
    assert moved["bfloat16"] < 0.3


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_learns_in_bfloat16(trainer: Trainer, state_dtype: str) -> None:
    batch = make_batch(CONFIG, 0)
    kwargs: Any = {"dtype": "bfloat16", "state_dtype": state_dtype, "optimizer": ADAMW}
    state = trainer.state(CONFIG, make_params(CONFIG), **kwargs)
    state, metrics = trainer.steps(state, [batch] * 12)
    wide = trainer.state(CONFIG, make_params(CONFIG), optimizer=ADAMW)
    _, expected = trainer.steps(wide, [batch] * 12)
    assert_close(metrics["loss"], expected["loss"], "output", "bfloat16")
    assert metrics["loss"][-1] < 0.7 * metrics["loss"][0]


def test_recomputing_changes_nothing(trainer: Trainer) -> None:
    losses = []
    for flag in (True, False):
        kwargs = {"dtype": "float64", "state_dtype": "float64", "gradient_checkpointing": flag}
        with trainer.precision("float64"):
            state = trainer.state(CONFIG, make_params(CONFIG), optimizer=ADAMW, **kwargs)
            losses.append(trainer.steps(state, batches(3))[1]["loss"])
    assert_close(losses[0], losses[1], "output", "float64")


def test_evaluation_is_the_mean_over_all_tokens(trainer: Trainer) -> None:
    data = batches(3)
    data[0] = data[0]._replace(weights=np.where(data[0].segment_pos == 2, 1, 0).astype(np.float32))
    state = trainer.state(CONFIG, make_params(CONFIG), optimizer=ADAMW)
    given = trainer.module.evaluate(state, iter(data))
    each = [trainer.module.evaluate(state, [batch]) for batch in data]
    tokens = np.array([batch.weights.sum() for batch in data])
    assert [result["tokens"] for result in each] == tokens.tolist()
    expected = sum(result["loss"] * result["tokens"] for result in each) / tokens.sum()
    assert given["loss"] == pytest.approx(expected, rel=1e-6)
    assert given["tokens"] == tokens.sum()
    assert given["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert trainer.module.evaluate(state, [])["tokens"] == 0


def test_what_was_given_stays_in_jax() -> None:
    """Parameters are copied, since a step donates its state."""
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    from recurrentgemma import jax as recurrentgemma

    model = recurrentgemma.Griffin(CONFIG)
    params = recurrentgemma.init_params(CONFIG, 0)
    state = recurrentgemma.create_train_state(model, params, optimizer=ADAMW)
    given = recurrentgemma.parameters(state)
    state, _ = recurrentgemma.train_step(state, make_batch(CONFIG, 0))
    for tree in (params, given):
        embedding = np.asarray(tree["embedder"]["input_embedding"])
        assert np.isfinite(embedding).all()
    np.testing.assert_array_equal(
        params["embedder"]["input_embedding"], given["embedder"]["input_embedding"]
    )


def test_the_hidden_state_gives_the_logits(trainer: Trainer) -> None:
    batch = make_batch(CONFIG, 0)
    model, call = trainer.backend.raw_griffin(CONFIG, make_params(CONFIG))
    logits, _ = call(batch.tokens, batch.segment_pos, None)
    embedding = make_params(CONFIG)["embedder.input_embedding"]
    if trainer.name == "jax":
        tree = trainer.backend.twin.make(CONFIG, make_params(CONFIG).items(), "float32").params
        args = {"params": tree}, batch.tokens, batch.segment_pos
        import jax

        hidden, cache = jax.jit(lambda *args: model.apply(*args, method="hidden"))(*args)
        last, _ = jax.jit(lambda *args: model.apply(*args, None, True, method="hidden"))(*args)
    else:
        hidden, cache = model.hidden(batch.tokens, batch.segment_pos)
        last, _ = model.hidden(batch.tokens, batch.segment_pos, last_only=True)
    hidden, last, logits = map(trainer.backend.to_numpy, (hidden, last, logits))
    assert set(cache) == {f"blocks.{i}" for i in range(CONFIG.num_layers)}
    assert_close(hidden @ embedding.T, logits, "logits", "float32")
    np.testing.assert_array_equal(hidden[:, -1:], last)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_a_step_that_is_not_finite_is_skipped(trainer: Trainer, name: str) -> None:
    """It changes nothing, and the next step is as if it had not been."""
    optimizer = OptimizerOptions(name, learning_rate=1e-2, momentum=0.9, skip_nonfinite=True)
    good, bad = batches(2, SMALL)
    bad = bad._replace(weights=np.where(bad.weights > 0, np.inf, 0).astype(np.float32))
    skipped, metrics = trainer.steps(
        trainer.state(SMALL, make_params(SMALL), optimizer=optimizer), [good, bad, good]
    )
    plain, _ = trainer.steps(
        trainer.state(SMALL, make_params(SMALL), optimizer=optimizer), [good, good]
    )
    assert not math.isfinite(metrics["loss"][1])
    one, other = map(trainer.module.state_arrays, (skipped, plain))
    assert (one.pop("step"), other.pop("step")) == (3, 2)
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)
