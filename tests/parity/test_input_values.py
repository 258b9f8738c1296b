"""Values out of range: alike in both twins, checked on the host and by `check`."""

import numpy as np
import pytest
from cases import CONFIGS, make_params
from trainers import make_batch

from backends import Backend

CONFIG = CONFIGS["attention_last"]
GOOD = np.arange(6, dtype=np.int32).reshape(2, 3)
PLACES = np.array([[-1, 0, 1], [0, 1, 0]], np.int32)
WRONG = {
    "beyond": (
        GOOD + CONFIG.vocab_size - 5,
        PLACES,
        r"tokens must be from 0 to \d+, .* got \d+ at \(1, 2\)",
    ),
    "negative": (GOOD - 1, PLACES, r"tokens must be from 0 to \d+, .* got -1 at \(0, 0\)"),
    "padding behind": (
        GOOD,
        np.array([[0, 1, 2], [0, 1, -1]], np.int32),
        r"padding .* may only come before a row's tokens, got it behind a token in row 1 at 2",
    ),
    "padding between": (
        GOOD,
        np.array([[0, -1, 1], [0, 1, 2]], np.int32),
        r"got it behind a token in row 0 at 1",
    ),
}


def made(backend: Backend):
    model = backend.twin.make(CONFIG, make_params(CONFIG).items(), "float32")
    if backend.name == "torch":
        return model, model
    return model.module, lambda *inputs: model.module.apply({"params": model.params}, *inputs)


@pytest.mark.parametrize(("tokens", "places", "message"), WRONG.values(), ids=WRONG)
def test_values_of_the_host_are_checked(backend: Backend, tokens, places, message: str) -> None:
    model, apply = made(backend)
    with pytest.raises(ValueError, match=message):
        apply(tokens, places)
    on_device = (backend.array(tokens, "int32"), backend.array(places, "int32"))
    for inputs in ((tokens, places), on_device, (tokens.tolist(), places.tolist())):
        with pytest.raises(ValueError, match=message):
            model.check(*inputs)
    model.check(GOOD, PLACES)


def test_batches_of_the_host_are_checked(backend: Backend) -> None:
    batch = make_batch(CONFIG, 0)
    model = backend.twin.make(CONFIG, make_params(CONFIG).items(), "float32")
    args = (model,) if backend.name == "torch" else (model.module, model.params)
    module = backend.module
    if backend.name == "jax":
        import jax

        # Traced, which is enough to check a batch of the host.
        jax.eval_shape(lambda params: module.loss_fn(model.module, params, batch), model.params)
    else:
        module.loss_fn(*args, batch)  # targets of -100, which count nothing
    beyond = np.where(batch.weights > 0, CONFIG.vocab_size, batch.targets).astype(np.int32)
    state = module.create_train_state(*args)
    for wrong, message in (
        (batch._replace(targets=beyond), "targets must be from 0 to"),
        (batch._replace(tokens=batch.tokens - 1 - batch.tokens.max()), "tokens must be from 0"),
        (batch._replace(segment_pos=batch.segment_pos[:, ::-1].copy()), "padding .* before a row"),
    ):
        for use in (
            lambda wrong=wrong: module.loss_fn(*args, wrong),
            lambda wrong=wrong: module.train_step(state, wrong),
            lambda wrong=wrong: module.evaluate(state, [wrong]),
        ):
            with pytest.raises(ValueError, match=message):
                use()
