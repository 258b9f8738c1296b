"""Matrices packed for several rows on a CPU, and a few rows as columns."""

import copy

import pytest

pytest.importorskip("torch.nn", reason="torch is not installed")
import numpy as np
import torch
from cases import make_config

from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.twin import find_twin
from recurrentgemma.torch import Model, Sampler, load_tokenizer, products
from recurrentgemma.torch.quantization import keep_values, pack_matrices
from recurrentgemma.torch.runtime import kernels, stored
from recurrentgemma.torch.runtime.stored import PackedMatrix
from tolerances import assert_close

CONFIG = make_config("RA", vocab_size=2048, width=64, mlp_expanded_width=96)
packs = pytest.mark.skipif(not kernels.packed32_works(), reason="oneDNN does not pack float32")
packs16 = kernels.works(lambda: kernels._packs(torch.bfloat16))()
DTYPES = [
    pytest.param(torch.float32, marks=packs),
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(not packs16, reason="nor does it pack bfloat16")
    ),
]


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices stand for large ones."""
    monkeypatch.setattr(stored, "_LEAST", 0)
    monkeypatch.setattr(stored, "_LARGE", 0)
    monkeypatch.setattr(products, "_LEAST", 0)
    monkeypatch.setattr(kernels, "packed16_gains", lambda: packs16)  # on any vendor's CPU


def packed(model: Model, rows: int = 8) -> Model:
    result = copy.deepcopy(model)
    pack_matrices(result, rows)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 40])
@torch.no_grad()
def test_products_are_those_of_the_parameters(rows: int, dtype: torch.dtype) -> None:
    model, name = Model(CONFIG, dtype=dtype), str(dtype).removeprefix("torch.")
    tokens = torch.randint(0, 2048, (rows, 9))
    segment_pos = torch.arange(9).expand(rows, 9)
    logits, state = model(tokens, segment_pos)
    found, found_state = packed(model)(tokens, segment_pos)
    assert_close(found, logits, "logits", name)
    step = torch.randint(0, 2048, (rows, 1)), torch.full((rows, 1), 9)
    logits, _ = model(*step, state)
    found, _ = packed(model)(*step, found_state)
    assert_close(found, logits, "logits", name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_alone_are_packed_and_held_once(dtype: torch.dtype) -> None:
    model = Model(CONFIG, dtype=dtype)
    changed = packed(model)
    names = {name for name, module in changed.named_modules() if isinstance(module, PackedMatrix)}
    matrices = sum(spec.matrix for spec in layer_spec(CONFIG))
    assert len(names) == matrices
    assert not names & {name for name, _ in changed.named_parameters()}
    assert Sampler(model=changed, vocab=load_tokenizer()).engine.num_bytes == sum(
        parameter.nbytes for parameter in model.parameters()
    )
    state = changed.state_dict()
    for name, parameter in model.state_dict().items():
        assert torch.equal(state[name], parameter)


@packs
@torch.no_grad()
def test_a_small_matrix_is_also_kept_as_it_is_for_single_rows(monkeypatch) -> None:
    monkeypatch.setattr(stored, "_LARGE", 2**20)
    monkeypatch.setattr(kernels, "plain32_gains", lambda: False)
    model = Model(CONFIG)
    tokens, segment_pos = torch.randint(0, 2048, (3, 9)), torch.arange(9).expand(3, 9)
    both, (_, state) = packed(model), model(tokens, segment_pos)
    step = torch.randint(0, 2048, (3, 1)), torch.full((3, 1), 9)
    assert torch.equal(both(*step, state)[0], model(*step, state)[0])
    assert_close(both(tokens, segment_pos)[0], model(tokens, segment_pos)[0], "logits", "float32")
    assert all(torch.equal(both.state_dict()[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, torch.float32), (8, torch.float16), (8, torch.float64)]
)
def test_what_would_gain_nothing_stays(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "plain32_gains", lambda: False)
    model = packed(Model(CONFIG, dtype=dtype), rows)
    assert not any(isinstance(module, PackedMatrix) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_operators_nothing_is_packed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "packed32_works", lambda: False)
    monkeypatch.setattr(kernels, "packed16_gains", lambda: False)
    modules = packed(Model(CONFIG, dtype=dtype)).modules()
    assert not any(isinstance(module, PackedMatrix) for module in modules)


@packs
def test_where_mkl_is_slow_one_row_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "plain32_gains", lambda: True)
    modules = packed(Model(CONFIG), rows=1).modules()
    assert any(isinstance(module, PackedMatrix) for module in modules)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_compiled_is_not_packed(dtype: torch.dtype) -> None:
    model = Model(CONFIG, dtype=dtype)
    changed = packed(model)
    keep_values(changed)
    assert not any(isinstance(module, PackedMatrix) for module in changed.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(changed.get_parameter(name), parameter)
        assert changed.get_parameter(name).is_contiguous()  # as `torch.compile` makes fast code for


@packs
def test_texts_are_the_same() -> None:
    prompts = [f"{number} And" for number in range(8)]
    plain, fast = (
        find_twin("torch").load(None, "float32", decoding=decoding) for decoding in (0, 8)
    )
    assert any(isinstance(module, PackedMatrix) for module in fast.modules())
    texts = [Sampler(model=model, vocab=load_tokenizer())(prompts, 20) for model in (plain, fast)]
    assert texts[0].text == texts[1].text


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (8,), (2, 24), (50,)])
def test_a_few_rows_as_columns(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 48, generator=generator, requires_grad=True)
    w, b = torch.randn(32, 48, generator=generator), torch.randn(32, generator=generator)
    given = b if bias else None
    wanted = products.product(x, w, given, axis=-1)  # with derivatives: PyTorch's `linear`
    with torch.no_grad():
        found = products.product(x, w, given, axis=-1)
    assert found.is_contiguous()
    np.testing.assert_allclose(found.numpy(), wanted.detach().numpy(), rtol=1e-5, atol=1e-5)
