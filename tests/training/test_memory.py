"""The computed memory equals the size of the arrays."""

import numpy as np
import pytest

from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.memory import parameter_bytes, training_bytes
from recurrentgemma.common.model.presets import TemporalBlockType
from recurrentgemma.common.training.lora import LoraOptions
from recurrentgemma.common.training.optimization import OptimizerOptions

CONFIG = GriffinConfig(
    vocab_size=64,
    width=32,
    mlp_expanded_width=48,
    num_heads=4,
    block_types=(TemporalBlockType.RECURRENT, TemporalBlockType.ATTENTION),
    lru_width=40,
    attention_window_size=8,
    embeddings_scale_by_sqrt_dim=True,
    logits_soft_cap=30.0,
)


@pytest.mark.parametrize("lora", [None, LoraOptions(4), LoraOptions(4, targets=("gates",))])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_training(framework, optimizer, dtype, lora):
    pytest.importorskip({"jax": "flax.linen", "torch": "torch.nn"}[framework])
    options = OptimizerOptions(optimizer, momentum=0.9)
    expected = training_bytes(CONFIG, dtype, options, lora)
    if framework == "torch":
        import torch

        from recurrentgemma.torch import Griffin, training

        model = Griffin(CONFIG, dtype=getattr(torch, dtype))
        state = training.create_train_state(model, optimizer=options, lora=lora)
        arrays = dict(training.state_arrays(state))
    else:
        from recurrentgemma.jax import Griffin, init_params, training

        params = init_params(CONFIG, 0, dtype)
        model = Griffin(CONFIG, dtype=dtype, param_dtype=dtype)
        state = training.create_train_state(model, params, optimizer=options, lora=lora)
        arrays = dict(training.state_arrays(state))
    arrays.pop("step")
    trained = sum(a.nbytes for name, a in arrays.items() if name.startswith("parameters."))
    others = sum(a.nbytes for name, a in arrays.items() if not name.startswith("parameters."))
    assert expected.gradients == trained
    assert expected.trained == (0 if lora is None and dtype == "float32" else trained)
    assert expected.optimizer == others
    assert expected.parameters == parameter_bytes(CONFIG, dtype)
    assert expected.total == sum(expected)


def test_int8_base():
    """A byte a value and a float32 a column; embedding, norms and biases stay as they are."""
    from recurrentgemma.common.model.layer_spec import layer_spec

    matrices = [spec for spec in layer_spec(CONFIG) if spec.matrix]
    saved = sum(3 * s.size - 4 * s.size // s.shape[-2] for s in matrices)
    options = OptimizerOptions("sgd")
    plain = training_bytes(CONFIG, "float32", options, LoraOptions(4))
    quantized = training_bytes(CONFIG, "float32", options, LoraOptions(4, quantize=True))
    assert plain.parameters - quantized.parameters == saved
    assert np.all(np.array(plain[1:]) == quantized[1:])
