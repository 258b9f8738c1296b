"""Quantised weights in both twins: against the definition, on disk, and under adapters."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import make_config, make_params, make_tokens, positions
from sweeps import sweep
from trainers import make_batch

from backends import Backend
from recurrentgemma.common import quantization
from recurrentgemma.common.io.checkpoint import BUNDLED, load_tokenizer
from recurrentgemma.common.io.shards import WEIGHTS
from recurrentgemma.common.model import reference
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.quantization import SCHEMES, dequantize, quantize, quantize_parameter
from recurrentgemma.common.training.lora import LoraOptions
from recurrentgemma.parity.quantized import compare_quantized
from recurrentgemma_conversion import Format, convert
from tolerances import assert_close

# Two groups of 32 in the attention, three in the MLP, and a gate of 16 inputs.
CONFIG = make_config("RA", width=64, mlp_expanded_width=96, num_heads=4, vocab_size=2048)
TOKENS, PLACES = make_tokens(CONFIG, 2, 7), np.array([positions([7]), positions([3, 4])])
SPECS = layer_spec(CONFIG)


def held(scheme: str) -> dict:
    params = make_params(CONFIG)
    return {spec.path: quantize_parameter(spec, params[spec.path], scheme) for spec in SPECS}


def dense(scheme: str) -> dict[str, np.ndarray]:
    """The parameters that a scheme stands for."""
    return {
        path: dequantize(value) if isinstance(value, quantization.Quantized) else value
        for path, value in held(scheme).items()
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_dequantised_form_is_the_reference(backend: Backend, scheme: str) -> None:
    expected, _ = reference.forward(CONFIG, dense(scheme), TOKENS, PLACES)
    twin = backend.twin
    with twin.precision("float64"):
        model = twin.dequantizing(twin.make(CONFIG, held(scheme).items(), "float64"))
        logits = twin.forward(model, TOKENS, PLACES).activations["logits"]
    assert_close(logits, expected, "logits", "float64")
    for path, value in twin.params(model).items():
        np.testing.assert_array_equal(value, dense(scheme)[path])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_and_sums_are_equal_to_the_bit(twins: tuple[Backend, Backend], scheme: str) -> None:
    both = [backend.twin for backend in twins]
    found = [twin.quantized(twin.make(CONFIG, held(scheme).items(), "float32")) for twin in both]
    differences = compare_quantized(both, found)
    assert differences.matrices == sum(spec.matrix or spec.table for spec in SPECS)
    assert differences.equal, differences
    some = next(iter(found[1]))
    values = found[1][some].values
    wrong = found[0], found[1] | {some: found[1][some].replace(values=-values)}
    differences = compare_quantized(both, wrong)
    assert (differences.stored, differences.rows) == ([some], [])
    assert differences.sums == ([some] if found[1][some].scheme == "q8" else [])


@pytest.mark.parametrize("shape", [(64, 5), (2, 64, 6), (4, 16, 5)])
@pytest.mark.parametrize("scheme", ["q8", "q4"])
def test_products(backend: Backend, shape: tuple[int, ...], scheme: str) -> None:
    """A matrix, a stack that shares its rows, and blocks; a row alone gives the same bits."""
    rng, twin = np.random.default_rng(0), backend.twin
    w = quantize(rng.standard_normal(shape).astype(np.float32), scheme)
    rows = (shape[0] if shape[0] == 4 else 1, 3) if len(shape) == 3 else (3,)
    x = rng.standard_normal((*rows, shape[-2])).astype(np.float32)
    bias = rng.standard_normal(shape[-1]).astype(np.float32)

    def computed(x: np.ndarray) -> np.ndarray:
        matrix = w.with_parts(lambda part: twin.from_numpy(part, part.dtype.name))
        if twin.name == "torch":
            from recurrentgemma.torch.quantization import QuantizedMatrix

            matrix = QuantizedMatrix(matrix)
        given = (twin.from_numpy(z, "float32") for z in (x, bias))
        x_, bias_ = given
        bias_ = bias_ if len(shape) == 2 else bias_[None, None]
        return twin.to_numpy(twin.products.product(x_, matrix, bias_))

    y = computed(x)
    assert_close(y, quantization.product(x, w) + bias, "logits", "float32")
    if scheme == "q8":
        np.testing.assert_array_equal(computed(x[..., :1, :]), y[..., :1, :])


def test_an_integer_product_has_the_slope_of_the_dequantised_one(backend: Backend) -> None:
    rng, twin = np.random.default_rng(0), backend.twin
    w = quantize(rng.standard_normal((64, 5)).astype(np.float32), "q8")
    x, dy = rng.standard_normal((3, 64)), rng.standard_normal((3, 5))
    x, dy = (twin.from_numpy(z.astype(np.float32), "float32") for z in (x, dy))
    matrix = w.with_parts(lambda part: twin.from_numpy(part, part.dtype.name))
    if twin.name == "torch":
        from recurrentgemma.torch.quantization import QuantizedMatrix

        x.requires_grad_()
        y = twin.products.product(x, QuantizedMatrix(matrix))
        y.backward(dy)
        dx = x.grad
    else:
        import jax

        y, backward = jax.vjp(lambda x: twin.products.product(x, matrix), x)
        (dx,) = backward(dy)
    x, y, dx, dy = (twin.to_numpy(z) for z in (x, y, dx, dy))
    assert_close(y, quantization.product(x, w), "logits", "float32")
    assert_close(dx, dy @ dequantize(w).T, "gradient", "float32")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_folders(twins: tuple[Backend, Backend], scheme: str, tmp_path: Path) -> None:
    """What either twin saves is what `convert` writes; a folder loads as the weights quantise."""
    convert(BUNDLED, tmp_path / "one", Format.RECURRENTGEMMA, quantize=scheme)
    expected = (tmp_path / "one" / WEIGHTS).read_bytes()
    for backend in twins:
        twin = backend.twin
        model = twin.load(tmp_path / "one", "bfloat16")
        twin.save(tmp_path / twin.name, model, load_tokenizer())
        assert (tmp_path / twin.name / WEIGHTS).read_bytes() == expected
        assert (tmp_path / twin.name / "config.json").read_text() == (
            tmp_path / "one" / "config.json"
        ).read_text()
        own = twin.quantized(twin.load(None, "bfloat16", quantize=scheme))
        for path, value in twin.quantized(model).items():
            assert (value.scheme, value.dtype) == (own[path].scheme, "bfloat16")
            for part, array in value.parts.items():
                one, other = map(twin.to_numpy, (array, own[path].parts[part]))
                np.testing.assert_array_equal(one, other)


def test_adapters_on_a_quantised_model(backend: Backend) -> None:
    """They train, the base keeps its bytes, and without adapters there is nothing to train."""
    twin, batch = backend.twin, make_batch(CONFIG, 0)
    settings = {"gradient_checkpointing": True, "state_dtype": "float32"}
    model = twin.make(CONFIG, held("q4_32").items(), "float32")
    with pytest.raises(ValueError, match=r"quantised weights cannot be trained.*--lora-rank"):
        twin.train_state(model, **settings)
    state = twin.train_state(model, lora=LoraOptions(2), **settings)
    before = twin.params(twin.trained(state))
    losses = []
    for _ in range(3):
        state, metrics = twin.training.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    after = twin.params(twin.trained(state))
    for spec in SPECS:
        changed = not np.array_equal(before[spec.path], after[spec.path])
        assert changed == (spec.lora in LoraOptions().targets), spec.path


def test_a_torch_model_is_copied_moved_and_pickled() -> None:
    torch = pytest.importorskip("torch.nn", reason="torch is not installed") and __import__("torch")
    from recurrentgemma.torch import Griffin
    from recurrentgemma.torch.quantization import quantize_matrices

    model = Griffin(CONFIG)
    model.reset_parameters(0)
    quantize_matrices(model, "q4_32")
    names = {name for name in model.state_dict() if ".proj_q." in name}
    assert names == {
        f"blocks.1.attention_block.proj_q.weight.{p}" for p in ("values", "scale", "zero")
    }
    inputs = torch.tensor(TOKENS), torch.tensor(PLACES)
    with torch.no_grad():
        expected = model(*inputs)[0]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(*inputs)[0], expected, rtol=0, atol=0)
        other.load_state_dict(model.state_dict())
        narrow = copy.deepcopy(model).to(torch.bfloat16)
        matrix: Any = narrow.embedder.input_embedding
        assert (matrix.dtype, matrix.scale.dtype) == (torch.bfloat16, torch.float32)
        assert narrow.init_cache(1)["blocks.1"].keys.dtype == torch.bfloat16
        assert_close(narrow(*inputs)[0].numpy(), expected.numpy(), "logits", "bfloat16")
    assert "q4_32 [64, 64]" in repr(model.blocks[1])
    assert model.to("meta").embedder.input_embedding.device.type == "meta"


def test_bits_per_byte_of_held_out_text(backend: Backend) -> None:
    """8 bits cost at most 0.1 %, 4 bits 1 %, and in groups of 32 0.6 %."""
    text = (BUNDLED.parents[2] / "notebooks/texts/emma_22.txt").read_text(encoding="utf-8")
    text = text[: sweep(1000, 2500)]
    most = {"q8": 0.001, "q4": 0.01, "q4_32": 0.006}

    def bits(scheme: str | None) -> float:
        model = backend.twin.load(None, "float32", quantize=scheme)
        (score,) = backend.twin.sampler(model, load_tokenizer()).score([text])
        return -float(score.total)

    plain = bits(None)
    # XLA compiles each scheme.
    for scheme in most if backend.name == "torch" else ("q8",):
        assert bits(scheme) < plain * (1 + most[scheme]), scheme


def test_an_engine_tells_its_dtype_and_size(backend: Backend) -> None:
    model = backend.twin.load(None, "bfloat16", quantize="q4_32")
    engine = backend.twin.sampler(model, load_tokenizer()).engine
    assert engine.dtype == "bfloat16"
    # JAX expands 4 bits to 8 on a CPU; in bfloat16 the model has 10.7e6 bytes.
    assert engine.num_bytes < (6e6 if backend.twin.name == "jax" else 4e6)


def test_a_model_in_another_scheme(backend: Backend, tmp_path: Path) -> None:
    convert(BUNDLED, tmp_path / "q8", Format.RECURRENTGEMMA, quantize="q8")
    with pytest.raises(ValueError, match=r"is quantised as q8 already.*to get q4"):
        backend.twin.load(tmp_path / "q8", "float32", quantize="q4")
    with pytest.raises(ValueError, match="quantize must be one of q8, q4, q4_32, got 'int8'"):
        backend.twin.load(None, "float32", quantize="int8")
