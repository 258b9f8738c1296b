"""The cross-entropy in chunks, against the plain one over all logits."""

import numpy as np
import pytest
from cases import CONFIGS, make_config, make_params, next_token_loss
from sweeps import sweep
from trainers import TRAINERS, Trainer, make_batch

from recurrentgemma.common.generation.chunks import loss_chunk
from recurrentgemma.common.model import reference
from recurrentgemma.common.training.batch import Batch
from tolerances import assert_close

ROWS, LENGTH, WIDTH, VOCAB = 3, 7, 12, 29


def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states, embedding, targets, and weights, some 0 and some fractions."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((ROWS, LENGTH, WIDTH))
    embedding = rng.standard_normal((VOCAB, WIDTH))
    targets = rng.integers(VOCAB, size=(ROWS, LENGTH))
    weights = rng.random((ROWS, LENGTH)) * rng.integers(0, 2, (ROWS, LENGTH))
    return hidden, embedding, np.where(weights > 0, targets, -100), weights


def plain(hidden, embedding, targets, weights, soft_cap: float):
    """The loss and its gradients by definition, from all logits in float64."""
    product = hidden @ embedding.T
    tanh = np.tanh(product / soft_cap) if soft_cap else 0.0
    logits = np.asarray(soft_cap * tanh if soft_cap else product)
    exp = np.exp(logits)
    nll = np.log(exp.sum(-1)) - np.take_along_axis(logits, targets[..., None] % VOCAB, -1)[..., 0]
    dlogits = exp / exp.sum(-1, keepdims=True) - np.eye(VOCAB)[targets % VOCAB]
    dproduct = dlogits * weights[..., None] * (1 - tanh**2 if soft_cap else 1)
    dembedding = np.einsum("btv,btd->vd", dproduct, hidden)
    return float((weights * nll).sum()), (dproduct @ embedding, dembedding, nll)


@pytest.mark.parametrize("chunk_size", [1, 4, 7, None])
@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
def test_is_the_plain_one(trainer: Trainer, soft_cap: float, chunk_size: int | None) -> None:
    inputs = problem()
    counted = inputs[-1] > 0
    loss, gradients = trainer.cross_entropy(
        *inputs, dtype="float64", soft_cap=soft_cap, chunk_size=chunk_size
    )
    hidden, embedding, targets, weights = inputs
    expected, (*others, nll) = plain(hidden, embedding, targets, weights, soft_cap)
    assert_close(loss, expected, "output", "float64")
    for name, one, other in zip(("hidden", "embedding"), gradients, others, strict=False):
        assert_close(one, other, "gradient", "float64", name=name)
    assert_close(gradients[2][counted], nll[counted], "gradient", "float64", name="weights")


@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
def test_second_derivatives(trainer: Trainer, soft_cap: float) -> None:
    """Slopes of the gradients, along random directions."""
    hidden, embedding, targets, weights = problem()
    rng = np.random.default_rng(1)

    def direction() -> tuple[np.ndarray, ...]:
        moves = (rng.standard_normal(z.shape) for z in (hidden, embedding, weights))
        dhidden, dembedding, dweights = moves
        return dhidden, dembedding, np.where(weights > 0, dweights, 0)

    directions, along = direction(), direction()

    def projected(step: float) -> float:
        moved = (z + step * d for z, d in zip((hidden, embedding, weights), along, strict=True))
        hidden_, embedding_, weights_ = moved
        _, gradients = plain(hidden_, embedding_, targets, weights_, soft_cap)
        return sum((d * g).sum() for d, g in zip(directions, gradients, strict=True))

    seconds = trainer.cross_entropy_second(
        hidden, embedding, targets, weights, directions, soft_cap=soft_cap, chunk_size=4
    )
    slope = (projected(1e-5) - projected(-1e-5)) / 2e-5
    expected = sum((d * g).sum() for d, g in zip(along, seconds, strict=True))
    assert_close(slope, expected, "slope", "float64")


@pytest.mark.parametrize("name", sweep(["attention_first"], list(CONFIGS)))
def test_of_a_model(trainer: Trainer, name: str) -> None:
    """`loss_fn` equals the reference's loss, and its gradient the one through the logits."""
    config = CONFIGS[name]
    params, batch = make_params(config), make_batch(config, 0)
    logits, state = reference.forward(config, params, batch.tokens, batch.segment_pos)
    # `next_token_loss` takes the first token, then the targets.
    tokens = np.concatenate([batch.tokens[:, :1], batch.targets], 1) % config.vocab_size
    longer = np.concatenate([logits, logits[:, :1]], 1)
    expected, dlogits = next_token_loss(longer, tokens, batch.weights.astype(np.float64))
    model = trainer.backend.griffin(config, params)
    nothing = {
        block: {field: np.zeros_like(leaf) for field, leaf in fields.items()}
        for block, fields in state.items()
    }
    gradients = model.grads(batch.tokens, batch.segment_pos, dy=dlogits[:, :-1], dstate=nothing)[
        "params"
    ]
    loss, given = loss_gradients(trainer, config, params, batch)
    assert_close(loss, expected, "output", "float64")
    assert set(given) == set(gradients)
    assert_close(given, {path: gradients[path] for path in given}, "gradient", "float64")


def loss_gradients(trainer: Trainer, config, params, batch):
    """`loss_fn` and its gradient by path, in float64."""
    from recurrentgemma.common.model.layer_spec import layer_spec
    from recurrentgemma.common.model.state_dict import to_torch, torch_name

    module = trainer.module
    with trainer.precision("float64"):
        state = trainer.state(config, params, dtype="float64", state_dtype="float64")
        if trainer.name == "jax":
            import jax

            from recurrentgemma.jax.runtime.trees import get_path

            def loss(params):
                return module.loss_fn(state.model, params, batch)

            tree = module.parameters(state)
            (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(tree)
            given = {s.path: np.asarray(get_path(grads, s.path)) for s in layer_spec(config)}
        else:
            value, metrics = module.loss_fn(state.model, batch)
            value.backward()
            assert metrics["tokens"] == batch.weights.sum()
            given = {
                s.path: to_torch(s.path, state.model.get_parameter(torch_name(s.path)).grad.numpy())
                for s in layer_spec(config)
            }
        return float(value.detach() if trainer.name == "torch" else value), given


def test_in_bfloat16(trainer: Trainer) -> None:
    """Products of bfloat16 values are summed in float32; only gradients are rounded."""
    hidden, embedding, targets, weights = problem()
    hidden, embedding = (rounded(z) for z in (hidden, embedding))
    loss, gradients = trainer.cross_entropy(
        hidden, embedding, targets, rounded(weights), dtype="bfloat16", soft_cap=5.0, chunk_size=4
    )
    expected, others = plain(hidden, embedding, targets, rounded(weights), 5.0)
    assert loss == pytest.approx(expected, rel=1e-6)
    for one, other in zip(gradients[:2], others[:2], strict=True):
        assert_close(one, other, "output", "bfloat16")


def rounded(x: np.ndarray) -> np.ndarray:
    import ml_dtypes

    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def test_what_has_no_weight_does_not_matter(trainer: Trainer) -> None:
    hidden, embedding, targets, weights = problem()
    one = trainer.cross_entropy(hidden, embedding, targets, weights, dtype="float64")
    others = np.where(weights > 0, targets, 3)
    other = trainer.cross_entropy(hidden, embedding, others, weights, dtype="float64")
    assert one[0] == other[0]
    np.testing.assert_array_equal(one[1][0], other[1][0])
    np.testing.assert_array_equal(one[1][0][weights == 0], 0)
    nothing, gradients = trainer.cross_entropy(
        hidden, embedding, targets, 0 * weights, dtype="float64"
    )
    assert nothing == 0
    assert not any(gradient.any() for gradient in gradients[:2])


@pytest.mark.usefixtures("unchecked_types")  # JAX's batch holds NumPy arrays
@pytest.mark.parametrize("shape", [(3, 0), (0, 7)], ids=str)
def test_of_no_tokens(trainer: Trainer, shape: tuple[int, int]) -> None:
    rows, length = shape
    hidden, embedding, targets, weights = problem()
    inputs = (
        hidden[:rows, :length], embedding, targets[:rows, :length], weights[:rows, :length]
    )  # fmt: skip
    loss, (dhidden, dembedding, dweights) = trainer.cross_entropy(*inputs, dtype="float64")
    assert loss == 0
    assert (dhidden.shape, dweights.shape) == ((*shape, WIDTH), shape)
    np.testing.assert_array_equal(dembedding, np.zeros_like(embedding))
    zeros = np.zeros(shape, np.int32)
    nothing = Batch(zeros, zeros, zeros, np.zeros(shape, np.float32))
    config = make_config("R")
    state = trainer.state(config, make_params(config))
    params = [trainer.module.parameters(state)] if trainer.name == "jax" else []
    _, metrics = trainer.module.loss_fn(state.model, *params, nothing)
    assert float(metrics["loss"]) == float(metrics["tokens"]) == 0


def test_no_logits_of_all_tokens_in_jax() -> None:
    """No array in the forward or backward pass is as large as all logits."""
    if "jax" not in TRAINERS:
        pytest.skip("jax is not installed")
    import jax
    from jax.extend.core import jaxprs_in_params

    from recurrentgemma.jax import cross_entropy

    hidden, embedding, targets, weights = (np.float32(z) for z in problem())
    labels = targets.astype(np.int32)

    def loss(hidden, embedding):
        return cross_entropy(hidden, embedding, labels, weights, 5.0, 4)

    def sizes(jaxpr) -> list[int]:
        found = [v.aval.size for equation in jaxpr.eqns for v in equation.outvars]
        for equation in jaxpr.eqns:
            for inner in jaxprs_in_params(equation.params):
                found += sizes(inner)
        return found

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(hidden, embedding)
    largest = max(sizes(jaxpr.jaxpr))
    assert largest <= max(4 * VOCAB, embedding.size, hidden.size + 3 * WIDTH)
    assert largest < targets.size * VOCAB


def test_no_logits_of_all_tokens_in_torch() -> None:
    if "torch" not in TRAINERS:
        pytest.skip("torch is not installed")
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from recurrentgemma.torch import cross_entropy

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    hidden, embedding, _, weights = (torch.tensor(z) for z in problem())
    labels = torch.tensor(problem()[2])
    with Sizes():
        args = hidden.requires_grad_(), embedding.requires_grad_(), labels, weights, 5.0, 4
        cross_entropy(*args).backward()
    assert max(sizes) <= max(4 * VOCAB, embedding.numel(), hidden.numel())
    assert max(sizes) < labels.numel() * VOCAB


@pytest.mark.parametrize(
    ("length", "vocab_size", "limit", "expected"),
    [
        (4096, 256_000, None, 128),  # 32 chunks of at most 131
        (1024, 8192, None, 1024),
        (1024, 8192, 1000, 512),
        (7, 10, 3, 3),
        (0, 10, None, 1),
        (5, 1 << 26, None, 1),
    ],
)
def test_chunks(length: int, vocab_size: int, limit: int | None, expected: int) -> None:
    assert loss_chunk(length, vocab_size, limit) == expected


def test_a_chunk_has_a_token() -> None:
    with pytest.raises(ValueError, match="at least one token, got 0"):
        loss_chunk(7, 10, 0)
