"""The published fine-tuning tutorial's own code, as it is written there, on a small model.

Its names, calls and statements are the tutorial's; the data pipeline is left out.
"""

# ruff: noqa: RET504, SIM103

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from cases import make_config, make_params
from trainers import TRAINERS

from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.training.batch import Batch
from recurrentgemma.common.training.optimization import OptimizerOptions, decay_mask

pytest.importorskip("jax.numpy", reason="jax is not installed")

import flax.struct
import jax
import jax.numpy as jnp
import optax

from recurrentgemma import jax as recurrentgemma
from recurrentgemma.jax.runtime.trees import get_path, set_path

PAD, LENGTH, ROWS = 0, 12, 2
CONFIG = make_config("RA")


@flax.struct.dataclass  # chex.dataclass(frozen=True) there
class TrainingInput:
    # Input tokens provided to the model.
    input_tokens: jax.Array

    # A mask that determines which tokens contribute to the target loss
    # calculation.
    target_mask: jax.Array


def forward_and_loss_fn(
    params,
    *,
    model: recurrentgemma.Griffin,
    input_tokens: jax.Array,  # Shape [B, L]
    input_mask: jax.Array,  # Shape [B, L]
    positions: jax.Array,  # Shape [B, L]
) -> jax.Array:
    batch_size = input_tokens.shape[0]
    # Forward pass on the input data.
    # No attention cache is needed here.
    # Exclude the last step as it does not appear in the targets.
    logits, _ = model.apply(
        {"params": params},
        tokens=input_tokens[:, :-1],
        segment_pos=positions[:, :-1],
        cache=None,
    )

    # Similarly, the first token cannot be predicteds.
    target_tokens = input_tokens[:, 1:]
    target_mask = input_mask[:, 1:]

    # Convert the target labels into one-hot encoded vectors.
    one_hot = jax.nn.one_hot(target_tokens, logits.shape[-1])

    # Don't update on unwanted tokens.
    one_hot = one_hot * target_mask.astype(one_hot.dtype)[..., None]

    # Normalization factor.
    norm_factor = batch_size * (jnp.sum(target_mask) + 1e-8)

    # Return the negative log-likelihood loss (NLL) function.
    return -jnp.sum(jax.nn.log_softmax(logits) * one_hot) / norm_factor


Params = Mapping[str, Any]


def get_positions(example: jax.Array, pad_id: int) -> jax.Array:
    """Builds the position vector from the given tokens."""
    pad_mask = example != pad_id
    positions = jnp.cumsum(pad_mask, axis=-1)
    # Subtract one for all positions from the first valid one as they are
    # 0-indexed
    positions = positions - (positions >= 1)
    return positions


@functools.partial(
    jax.jit,
    static_argnames=["model", "optimizer"],
    donate_argnames=["params", "opt_state"],
)
def train_step(
    model: recurrentgemma.Griffin,
    params: Params,
    optimizer: optax.GradientTransformation,
    opt_state: optax.OptState,
    pad_id: int,
    example: TrainingInput,
) -> tuple[jax.Array, Params, optax.OptState]:
    positions = get_positions(example.input_tokens, pad_id)

    # Forward and backward passes.
    train_loss, grads = jax.value_and_grad(forward_and_loss_fn)(
        params,
        model=model,
        input_tokens=example.input_tokens,
        input_mask=example.target_mask,
        positions=positions,
    )
    # Update the parameters.
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)  # pyright: ignore[reportAssignmentType]

    return train_loss, params, opt_state


@functools.partial(jax.jit, static_argnames=["model"])
def validation_step(
    model: recurrentgemma.Griffin,
    params: Params,
    pad_id: int,
    example: TrainingInput,
) -> jax.Array:
    return forward_and_loss_fn(
        params,
        model=model,
        input_tokens=example.input_tokens,
        input_mask=example.target_mask,
        positions=get_positions(example.input_tokens, pad_id),
    )


def griffin_weight_decay_mask(params_like: optax.Params) -> Any:
    # Don't put weight decay on the RGLRU, the embeddings and any biases
    def enable_weight_decay(path: list[Any], _: Any) -> bool:
        # Parameters in the LRU and embedder
        path = [dict_key.key for dict_key in path]
        if "rg_lru" in path or "embedder" in path:
            return False
        # All biases and scales
        if path[-1] in ("b", "scale"):
            return False
        return True

    return jax.tree_util.tree_map_with_path(enable_weight_decay, params_like)


def make_optimizer(optimizer_choice: str) -> optax.GradientTransformation:
    """The tutorial's two, at its settings."""
    if optimizer_choice == "sgd":
        return optax.sgd(learning_rate=1e-3)
    return optax.adamw(
        learning_rate=1e-4,
        b2=0.96,
        eps=1e-8,
        weight_decay=0.1,
        mask=griffin_weight_decay_mask,
    )


def example() -> TrainingInput:
    """Rows of text then padding, loss on the second half of the text."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, CONFIG.vocab_size, (ROWS, LENGTH + 1), dtype=np.int32)
    tokens[0, -3:] = PAD
    mask = np.zeros(tokens.shape, bool)
    mask[:, 5:] = tokens[:, 5:] != PAD
    return TrainingInput(input_tokens=tokens, target_mask=mask)  # pyright: ignore[reportArgumentType]


def as_batch(given: TrainingInput) -> Batch:
    """The same for `train_step`."""
    positions = np.asarray(get_positions(given.input_tokens, PAD), np.int32)
    tokens, mask = np.asarray(given.input_tokens), np.asarray(given.target_mask, np.float32)
    return Batch(tokens[:, :-1], positions[:, :-1], tokens[:, 1:], mask[:, 1:])


@pytest.mark.parametrize("choice", ["sgd", "adamw"])
def test_as_published(choice: str) -> None:
    model = recurrentgemma.Griffin(CONFIG)
    params = recurrentgemma.init_params(CONFIG, 0)
    optimizer = make_optimizer(choice)
    opt_state = jax.jit(optimizer.init)(params)
    losses = []
    for _ in range(3):
        loss, params, opt_state = train_step(
            model=model,
            params=params,
            optimizer=optimizer,
            opt_state=opt_state,
            pad_id=PAD,
            example=example(),
        )
        losses.append(float(loss))
    after = validation_step(model, params, PAD, example())
    assert losses[0] > losses[1] > losses[2] > after > 0


@pytest.mark.parametrize("choice", ["sgd", "adamw"])
def test_ours_is_theirs_without_its_errors(choice: str) -> None:
    """With the loss times the batch size, and the mask without the leaves named bias, in float64.

    AdamW sees the scale of the loss in eps alone.
    """
    given = example()
    decay = decay_mask(layer_spec(CONFIG))
    mask: dict[str, Any] = {}
    for path, decays in decay.items():
        set_path(mask, path, decays)
    options, optimizer = {
        "sgd": (OptimizerOptions("sgd", 1e-3, clip_norm=None), optax.sgd(ROWS * 1e-3)),
        "adamw": (
            OptimizerOptions("adamw", 1e-4, 0.1, b2=0.96, clip_norm=None),
            optax.adamw(1e-4, b2=0.96, eps=1e-8 / ROWS, weight_decay=0.1, mask=mask),
        ),
    }[choice]
    with jax.enable_x64(True):
        model = recurrentgemma.Griffin(CONFIG, param_dtype=jnp.float64)
        params = recurrentgemma.init_params(CONFIG, 0, jnp.float64)
        state = recurrentgemma.create_train_state(
            model, params, optimizer=options, state_dtype=jnp.float64
        )
        theirs, expected, _ = train_step(
            model, params, optimizer, jax.jit(optimizer.init)(params), PAD, given
        )
        state, metrics = recurrentgemma.train_step(state, as_batch(given))
        updated = recurrentgemma.parameters(state)
    assert float(metrics["loss"]) == pytest.approx(ROWS * float(theirs), rel=1e-8)
    assert metrics["tokens"] == given.target_mask[:, 1:].sum()
    for spec in layer_spec(CONFIG):
        one, other = (np.asarray(get_path(tree, spec.path)) for tree in (updated, expected))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-8, err_msg=spec.path)


def test_their_mask_misses_biases() -> None:
    """Their leaves that decay and ours do not are those named bias, and no others differ."""
    theirs = griffin_weight_decay_mask(recurrentgemma.init_params(CONFIG, 0))
    for path, decays in decay_mask(layer_spec(CONFIG)).items():
        assert get_path(theirs, path) == (decays or path.endswith(".bias")), path


def test_the_same_loss_in_torch() -> None:
    if "torch" not in TRAINERS:
        pytest.skip("torch is not installed")
    losses = []
    for trainer in TRAINERS.values():
        state = trainer.state(CONFIG, make_params(CONFIG))
        losses.append(trainer.module.evaluate(state, [as_batch(example())])["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
