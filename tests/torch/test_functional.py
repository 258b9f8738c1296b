"""A model under `torch.func`: parameters that are handed in, and derivatives of derivatives."""

import io

import pytest

pytest.importorskip("torch.nn", reason="torch is not installed")
import numpy as np
import torch
from cases import CONFIGS, make_batch, make_config
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from recurrentgemma.common.model.config import Layer, ModelConfig
from recurrentgemma.common.model.mixers import Attention, Rope
from recurrentgemma.torch import Griffin, GriffinConfig, cross_entropy
from recurrentgemma.torch.softmax import BLOCKS_PER_WINDOW
from tolerances import assert_close

CONFIG = CONFIGS["griffin"]


def batch_of(length: int) -> tuple[torch.Tensor, ...]:
    """Tokens and positions."""
    return tuple(map(torch.from_numpy, make_batch(CONFIG, length)))


BATCH = batch_of(11)


def make_model(checkpointing: bool, config: ModelConfig | GriffinConfig = CONFIG) -> Griffin:
    model = Griffin(config, checkpointing, dtype=torch.float64)
    model.reset_parameters(seed=0)
    return model


def other_parameters(scale: float = 0.3) -> dict[str, torch.Tensor]:
    """Not those of `make_model`."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: p.shape for name, p in make_model(False).named_parameters()}
    return {
        name: scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def loss(model: Griffin, parameters: dict[str, torch.Tensor], tokens, segment_pos, cache=None):
    logits, state = functional_call(model, parameters, (tokens, segment_pos, cache))
    return logits.square().sum() + state["blocks.0"].rg_lru_state.sum()


def gradients(model: Griffin, parameters: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    loss(model, leaves, *BATCH).backward()
    return {name: to_numpy(leaf.grad) for name, leaf in leaves.items()}


def to_numpy(gradient: torch.Tensor | None) -> np.ndarray:
    assert gradient is not None
    return gradient.numpy()


def test_recomputes_with_the_parameters_handed_in() -> None:
    parameters = other_parameters()
    actual = gradients(make_model(True), parameters)
    assert_close(actual, gradients(make_model(False), parameters), "gradient", "float64")


def test_recomputes_with_one_tensor_in_two_places() -> None:
    """Which are not tied in the module."""
    grads = []
    for checkpointing in (True, False):
        parameters = other_parameters()
        shared = parameters["blocks.0.temporal_pre_norm.scale"].clone().requires_grad_()
        for name in ("temporal_pre_norm", "channel_pre_norm"):
            parameters[f"blocks.0.{name}.scale"] = shared
        loss(make_model(checkpointing), parameters, *BATCH).backward()
        grads.append(to_numpy(shared.grad))
    assert_close(grads[0], grads[1], "gradient", "float64")


def test_recomputes_with_the_parameters_it_had() -> None:
    """Others put in their place before the backward pass change nothing."""
    grads = []
    for checkpointing in (True, False):
        model = make_model(checkpointing)
        before = dict(model.named_parameters())
        total = model(*BATCH)[0].square().sum()
        model.load_state_dict(other_parameters(), assign=True)
        total.backward()
        grads.append({name: to_numpy(p.grad) for name, p in before.items()})
    assert_close(grads[0], grads[1], "gradient", "float64")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_func_grad(checkpointing: bool) -> None:
    model, parameters = make_model(checkpointing), other_parameters()
    actual = torch.func.grad(loss, 1)(model, parameters, *BATCH)
    actual = {name: to_numpy(gradient) for name, gradient in actual.items()}
    assert_close(actual, gradients(make_model(False), parameters), "gradient", "float64")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_each_row(checkpointing: bool) -> None:
    model, parameters = make_model(checkpointing), other_parameters()

    def of_a_row(parameters, tokens, segment_pos):
        return loss(model, parameters, tokens[None], segment_pos[None])

    with sdpa_kernel(SDPBackend.MATH):
        each = torch.vmap(torch.func.grad(of_a_row), (None, 0, 0))(parameters, *BATCH)
    actual = {name: to_numpy(gradient.sum(0)) for name, gradient in each.items()}
    assert_close(actual, gradients(make_model(False), parameters), "gradient", "float64")


def test_hooks_of_a_block_run_once() -> None:
    """And what they do to its output is differentiated."""
    model, calls = make_model(True), []

    def double(block, args, output):
        calls.append(block)
        return 2 * output[0], output[1]

    model.blocks[-1].register_forward_hook(double)
    weight = model.get_parameter("blocks.0.mlp_block.ffw_down.weight")
    grads = []
    for model.gradient_checkpointing in (True, False):
        total = model(*BATCH)[0].square().sum()
        grads.append(to_numpy(torch.autograd.grad(total, weight)[0]))
    assert len(calls) == 2
    assert_close(grads[0], grads[1], "gradient", "float64")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_second_derivatives(checkpointing: bool) -> None:
    """Where attention is made of operations that have them: against a central difference."""
    model, step = make_model(checkpointing), 1e-5
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]

    def along(create_graph: bool) -> torch.Tensor:
        total = model(*BATCH)[0].square().sum()
        grads = torch.autograd.grad(total, parameters, create_graph=create_graph)
        return torch.stack([(g * d).sum() for g, d in zip(grads, direction, strict=True)]).sum()

    def moved(by: float) -> None:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=by)

    with sdpa_kernel(SDPBackend.MATH):
        second = torch.autograd.grad(along(create_graph=True), parameters)
    given = sum(float((g * d).sum()) for g, d in zip(second, direction, strict=True))
    moved(step)
    above = along(create_graph=False)
    moved(-2 * step)
    slope = float(above - along(create_graph=False)) / (2 * step)
    assert_close(given, slope, "slope", "float64")


def loss_problem() -> tuple[torch.Tensor, ...]:
    """Hidden states, embedding, targets and weights, some of them 0."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    embedding = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    weights = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    weights[0, 1] = 0
    return hidden, embedding, torch.randint(7, (2, 3), generator=generator), weights


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_gradients_of_the_loss_of_each_row(cap: float) -> None:
    hidden, embedding, targets, weights = loss_problem()

    def of_a_row(hidden, embedding, targets, weights):
        return cross_entropy(hidden[None], embedding, targets[None], weights[None], cap, 4)

    each = torch.vmap(torch.func.grad(of_a_row, (0, 1)), (0, None, 0, 0))
    dhidden, dembedding = each(hidden, embedding, targets, weights)
    with torch.no_grad():
        losses = torch.vmap(of_a_row, (0, None, 0, 0))(hidden, embedding, targets, weights)
    hidden.requires_grad_()
    embedding.requires_grad_()
    total = cross_entropy(hidden, embedding, targets, weights, cap, 4)
    expected = torch.autograd.grad(total, (hidden, embedding))
    torch.testing.assert_close(losses.sum(), total.detach())
    for got, want in zip((dhidden, dembedding.sum(0)), expected, strict=True):
        assert_close(got.numpy(), want.numpy(), "gradient", "float64")


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("grad", [False, True])
def test_exported_models(grad: bool) -> None:
    """A prompt of any number of blocks, a step of any number of rows; with gradients to be had."""
    model, rows = make_model(True, make_config("RA")), {0: torch.export.Dim("rows", min=2)}
    block = CONFIG.attention_window_size // BLOCKS_PER_WINDOW
    prompt = rows | {1: block * torch.export.Dim("blocks", min=BLOCKS_PER_WINDOW + 2)}
    with torch.set_grad_enabled(grad):
        dynamic = prompt, prompt
        program = torch.export.export(model, batch_of(20 * block), dynamic_shapes=dynamic)
        tokens, segment_pos = batch_of(7 * block)
        logits, cache = model(tokens, segment_pos)
        torch.testing.assert_close(program.module()(tokens, segment_pos)[0], logits)
        cache = {name: type(z)(*(field.detach() for field in z)) for name, z in cache.items()}
        step = tokens[:, -1:], segment_pos[:, -1:] + 1, cache
        dynamic = (rows, rows, {name: type(z)(*(rows,) * len(z)) for name, z in cache.items()})
        program = torch.export.export(model, step, dynamic_shapes=dynamic)
        if not grad:  # else PyTorch saves what it refuses to load
            program = saved_and_loaded(program)
        some = {name: type(block)(*(z[:2] for z in block)) for name, block in cache.items()}
        step = step[0][:2], step[1][:2], some
        torch.testing.assert_close(program.module()(*step)[0], model(*step)[0])


@pytest.mark.parametrize("length", [5, 1])
@pytest.mark.parametrize("reach", [4, None], ids=["window", "all keys"])
def test_fake_tensors_go_on_from_a_state(reach: int | None, length: int) -> None:
    """Fake tensors have no values, so nothing reads one."""
    mixer = Attention(2, 1, 8, reach, Rope(), scale=1.0)
    config = ModelConfig(31, 16, (Layer(mixer, mlp=24, mlp_bias=False),))
    with FakeTensorMode():
        model = Griffin(config)
        positions = torch.arange(1, length + 1).expand(2, length)
        logits, cache = model(torch.zeros_like(positions), positions, model.init_cache(2))
    assert logits.shape == (2, length, 31)
    assert isinstance(cache["blocks.0"].keys, FakeTensor)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_positions_that_change_in_place_are_read_again(mode) -> None:
    """Also where the array changes whose memory they share, of which the tensor knows nothing."""
    model, place, token = make_model(False), np.array([[4]]), torch.tensor([[7]])
    shared = torch.from_numpy(place)
    with mode():
        _, cache = model(torch.arange(4)[None], torch.arange(4)[None])
        _, cache = model(token, shared, cache)
        place += 1
        again, _ = model(token, shared, cache)
        fresh, _ = model(token, torch.tensor([[5]]), cache)
    assert torch.equal(again, fresh)
    # What the host keeps serves derivatives, too, wherever it was made.
    model(torch.arange(4)[None], torch.arange(4)[None])[0].sum().backward()
