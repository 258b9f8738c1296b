"""Whatever a user holds in a framework goes in: batches of any arrays, numbers of any kind."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cases import make_config, make_params
from trainers import Trainer, make_batch

from recurrentgemma.common.generation.requests import checked_integer
from recurrentgemma.common.generation.strategies import Categorical, Greedy
from recurrentgemma.common.training.batch import Batch
from recurrentgemma.common.training.lora import LoraOptions
from recurrentgemma.common.training.optimization import OptimizerOptions

CONFIG = make_config("R")
FORMS = ["numpy", "int64", "lists", "own", "own bfloat16", "truth", "other"]


def in_form(trainer: Trainer, batch: Batch, form: str) -> Batch:
    """A batch in other arrays with the same values."""
    array = trainer.backend.array
    match form:
        case "numpy":
            return batch
        case "int64":
            return Batch(*(z.astype(np.int64) for z in batch))
        case "lists":
            return Batch(*(z.tolist() for z in batch))
        case "truth":
            return batch._replace(weights=batch.weights > 0)
        case "other":
            if trainer.name == "torch":
                pytest.skip("only JAX users load data with another framework")
            torch = pytest.importorskip("torch")
            return Batch(*map(torch.tensor, batch))
    weights = "bfloat16" if form == "own bfloat16" else "float32"
    tokens, segment_pos, targets = (array(z, "int32") for z in batch[:3])
    return Batch(tokens, segment_pos, targets, array(batch.weights, weights))


@pytest.mark.parametrize("form", FORMS)
def test_any_arrays_are_a_batch(trainer: Trainer, form: str) -> None:
    batches = [make_batch(CONFIG, seed, rows=40) for seed in range(2)]
    given = [in_form(trainer, batch, form) for batch in batches]
    assert sum(batch.weights.sum() for batch in batches) > 256  # bfloat16 counts to 256
    results = []
    for some in (batches, given):
        state = trainer.state(CONFIG, make_params(CONFIG))
        before = trainer.module.evaluate(state, some)
        state, metrics = trainer.steps(state, [some])
        results.append({**before, **{k: v.tolist() for k, v in metrics.items()}})
    assert results[0] == results[1]


@pytest.mark.parametrize("form", FORMS)
def test_any_arrays_have_a_loss(trainer: Trainer, form: str) -> None:
    batch = make_batch(CONFIG, 0)
    model = trainer.backend.twin.make(CONFIG, make_params(CONFIG).items(), "float32")
    args = (model,) if trainer.name == "torch" else (model.module, model.params)
    losses = [
        trainer.module.loss_fn(*args, some) for some in (batch, in_form(trainer, batch, form))
    ]
    (_, metrics), (_, others) = losses
    assert float(metrics["loss"]) == float(others["loss"])
    assert float(metrics["tokens"]) == float(others["tokens"]) == batch.weights.sum()


@pytest.mark.parametrize("wrong", [{"input_ids": [[2, 3]]}, ([[2, 3]], [[0, 1]]), None])
def test_what_is_no_batch_says_how_to_make_one(
    trainer: Trainer, wrong: Any, unchecked_types
) -> None:
    state = trainer.state(CONFIG, make_params(CONFIG))
    model = trainer.backend.twin.make(CONFIG, make_params(CONFIG).items(), "float32")
    args = (model,) if trainer.name == "torch" else (model.module, model.params)
    message = r"must be a Batch: Batch\.from_labels\(\*\*collated\)"
    for call in (
        lambda: trainer.module.loss_fn(*args, wrong),
        lambda: trainer.module.train_step(state, wrong),
        lambda: trainer.module.evaluate(state, [wrong]),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def numbers(trainer: Trainer, value: float | int) -> Iterator[Any]:
    """A number in all that it comes in."""
    kind = "int32" if isinstance(value, int) else "float32"
    yield np.dtype(kind).type(value)
    yield np.array(value, kind)
    yield np.array([value], kind)
    yield trainer.backend.array(np.array(value, kind), kind)
    yield trainer.backend.array(np.array([value], kind), kind)


def test_scalars_are_numbers(trainer: Trainer) -> None:
    for half in numbers(trainer, 0.5):
        assert Categorical(half, top_p=half, min_p=half) == Categorical(0.5, None, 0.5, 0.5)
        assert hash(Greedy(half)) == hash(Greedy(0.5))
        assert OptimizerOptions(learning_rate=half) == OptimizerOptions(learning_rate=0.5)
        assert LoraOptions(alpha=half) == LoraOptions(alpha=0.5)
    for five in numbers(trainer, 5):
        assert Categorical(top_k=five) == Categorical(top_k=5)
        assert LoraOptions(rank=five) == LoraOptions(rank=5)
        assert checked_integer("n", five, 0) == 5
        assert type(checked_integer("n", five, 0)) is int
    wrong: list[Any] = [np.bool_(True), np.array([1, 2]), "1", None]
    for value in wrong:
        with pytest.raises(ValueError, match="n must be an integer"):
            checked_integer("n", value, 0)
        with pytest.raises(ValueError, match="must be above 0"):
            Greedy(value)


@pytest.mark.parametrize("form", ["numpy", "lists", "own"])
def test_a_batch_from_labels(trainer: Trainer, form: str) -> None:
    """Labels move by one place; padding on the left has position -1, on the right no weight."""
    ids = np.array([[0, 0, 5, 6, 7], [5, 6, 7, 0, 0]])
    labels = np.array([[-100, -100, -100, 6, 7], [-100, 6, 7, -100, -100]])
    mask, places = (ids > 0).astype(int), np.array([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]])

    def formed(array: np.ndarray) -> Any:
        own = trainer.backend.array(array, "int32") if form == "own" else array
        return own.tolist() if form == "lists" else own

    def values(*args: Any, **kwargs: Any) -> list[Any]:
        return [np.asarray(z).tolist() for z in Batch.from_labels(*args, **kwargs)]

    tokens, positions, targets, weights = values(*map(formed, (ids, labels, mask)))
    assert tokens == ids[:, :-1].tolist()
    assert positions == [[-1, -1, 0, 1], [0, 1, 2, 3]]
    assert targets == labels[:, 1:].tolist()
    assert weights == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert values(formed(ids))[1:3] == [[[0, 1, 2, 3]] * 2, ids[:, 1:].tolist()]
    assert values(formed(ids), position_ids=formed(places))[1] == places[:, :-1].tolist()
    with pytest.raises(ValueError, match="not both"):
        Batch.from_labels(*map(formed, (ids, labels, mask, places)))
    with pytest.raises(ValueError, match="must have one shape"):
        Batch.from_labels(formed(ids), formed(labels[:, :-1]))
