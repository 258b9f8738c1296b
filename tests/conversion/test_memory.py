"""The published functions that take parameters from one framework to the other in memory."""

import numpy as np
import pytest
from cases import make_config, make_params

from recurrentgemma import conversion
from recurrentgemma.common.io.arrays import DTYPES
from recurrentgemma.common.model.layer_spec import layer_spec

jax = pytest.importorskip("jax", reason="jax is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")

CONFIG = make_config("RA")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32", "bool"])
def test_arrays_and_tensors(dtype: str) -> None:
    array = jax.numpy.arange(-3, 9).reshape(3, 4).astype(dtype)
    tensor = conversion.jax_array_to_torch_tensor(array)
    assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{dtype}", (3, 4))
    back = conversion.torch_tensor_to_jax_array(tensor.T)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(np.asarray(back), np.asarray(array).T)
    kept = np.array(back)
    tensor.zero_()  # neither shares memory with the other
    np.testing.assert_array_equal(np.asarray(back), kept)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("level", [True, False])
def test_a_models_parameters_there_and_back(dtype: str, level: bool) -> None:
    from recurrentgemma.jax import Griffin, init_params
    from recurrentgemma.torch import Griffin as TorchGriffin

    params = init_params(CONFIG, 0, dtype)
    state = conversion.flax_params_to_pytorch_state_dict({"params": params} if level else params)
    assert all(name.startswith("params.") == level for name in state)
    back = conversion.pytorch_state_dict_to_flax_params(state)
    assert jax.tree.structure(back) == jax.tree.structure({"params": params})
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    if not level:
        model = TorchGriffin(CONFIG, dtype=getattr(torch, dtype))
        model.load_state_dict(state)
        tree = conversion.pytorch_state_dict_to_flax_params(model.state_dict())
        tokens, positions = np.zeros((1, 2), np.int32), np.arange(2)[None]
        jax.eval_shape(Griffin(CONFIG, param_dtype=dtype).apply, tree, tokens, positions)


def test_flat_names() -> None:
    tree = {"params": {"blocks.0": {"a": {"kernel": 1}}, "b": 2}}
    assert conversion.flatten_nested_dict(tree) == {"params.blocks.0.a.kernel": 1, "params.b": 2}
    assert conversion.flatten_nested_dict(tree["params"], "x/") == {
        "x/blocks.0.a.kernel": 1,
        "x/b": 2,
    }


def test_any_parameters_with_our_names() -> None:
    """No config says which: a part of a model, or a model of somebody's own."""
    values = {s.path: make_params(CONFIG)[s.path] for s in layer_spec(CONFIG)[:4]}
    tree = {"layer": {"kernel": values["blocks.0.recurrent_block.linear_y.kernel"]}}
    state = conversion.flax_params_to_pytorch_state_dict(tree)
    np.testing.assert_array_equal(state["layer.weight"].numpy(), tree["layer"]["kernel"].T)
    narrow = {"kernel": np.ones((2, 3), DTYPES["bfloat16"])}
    assert conversion.flax_params_to_pytorch_state_dict(narrow)["weight"].dtype == torch.bfloat16
