"""Initial weights: the same in both twins, and distributed as the ledger says."""

import contextlib
import math

import numpy as np
import pytest
from cases import CONFIGS, make_config

from backends import Backend
from backends.base import sizes
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec, sample_params
from recurrentgemma.common.model.state_dict import to_torch, torch_name

LARGE = make_config("RA", vocab_size=256, width=64, lru_width=96, mlp_expanded_width=128)
MANY_CHANNELS = make_config(
    "R", vocab_size=8, width=64, mlp_expanded_width=8, num_heads=64, lru_width=2560
)


def expected_std(path: str, c: GriffinConfig) -> float:
    """The ledger, written out again: 0 for zeros, NaN for a_param."""
    stds = {
        "embedder.input_embedding": c.width**-0.5,
        "linear_x.kernel": c.width**-0.5,
        "linear_y.kernel": c.width**-0.5,
        "proj_q.kernel": c.width**-0.5,
        "proj_k.kernel": c.width**-0.5,
        "proj_v.kernel": c.width**-0.5,
        "ffw_up.w": c.width**-0.5,
        "linear_out.kernel": math.sqrt(2 / c.num_layers / c.lru_width),
        "proj_final.kernel": math.sqrt(2 / c.num_layers / c.width),
        "ffw_down.kernel": math.sqrt(2 / c.num_layers / c.mlp_expanded_width),
        "input_gate.w": math.sqrt(c.num_heads / c.lru_width),
        "a_gate.w": math.sqrt(c.num_heads / c.lru_width),
        "conv_1d.w": math.sqrt(0.01 / 4),
        "a_param": math.nan,
    }
    found = [std for name, std in stds.items() if path.endswith(name)]
    if not found:
        assert path.endswith((".scale", ".bias", ".b")), f"the ledger has no {path}"
        return 0.0
    return found[0]


def check_distributions(params, config: GriffinConfig) -> None:
    """Each within six standard errors of what it should be."""
    for path, stored in params.items():
        value = np.asarray(stored, np.float64)
        std = expected_std(path, config)
        if std == 0:
            assert not value.any(), path
        elif math.isnan(std):
            check_ring(value)
        else:
            error = std / math.sqrt(value.size)
            assert abs(value.mean()) < 6 * error, path
            assert abs(value.std() - std) < 6 * error / math.sqrt(2), path
            # Normal, not uniform nor cut off: the share within one standard deviation.
            share = (np.abs(value) < std).mean()
            assert abs(share - 0.6827) < 6 * math.sqrt(0.22 / value.size), path
            assert np.abs(value).max() > 2 * std, path


def check_ring(a_param: np.ndarray) -> None:
    """exp(-softplus(a_param)) squared is uniform on [0.9^2, 0.999^2]."""
    radius = np.exp(-np.logaddexp(a_param, 0))
    assert radius.min() > 0.9 - 1e-3
    assert radius.max() < 0.999 + 1e-3
    uniform = np.sort((radius**2 - 0.81) / (0.999**2 - 0.81))
    # Kolmogorov and Smirnov's distance; 2 / sqrt(n) is passed once in 1500 times.
    distance = np.abs(uniform - (np.arange(uniform.size) + 0.5) / uniform.size).max()
    assert distance < 2 / math.sqrt(uniform.size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_seed_gives_the_same_weights(
    twins: tuple[Backend, Backend], name: str, dtype: str
) -> None:
    config = CONFIGS[name]
    one, other = (backend.init_params(config, 17, dtype) for backend in twins)
    assert list(one) == list(other) == [spec.path for spec in layer_spec(config)]
    for path in one:
        assert one[path].dtype == other[path].dtype == dtype
        assert one[path].tobytes() == np.ascontiguousarray(other[path]).tobytes(), path


def test_the_seed_gives_the_spec_s_weights(backend: Backend) -> None:
    config = CONFIGS["griffin"]
    given = backend.init_params(config, 17)
    for spec, value in sample_params(config, 17):
        np.testing.assert_array_equal(given[spec.path], value, err_msg=spec.path)
    other = backend.init_params(config, 18)
    for path, value in given.items():
        assert (other[path] != value).any() == value.any(), path


def test_distributions(backend: Backend) -> None:
    check_distributions(backend.init_params(LARGE, 0), LARGE)


def test_flax_initialisers() -> None:
    """`model.init` has the shapes and distributions of the layer spec too."""
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    import jax

    from recurrentgemma.jax import Griffin
    from recurrentgemma.jax.runtime.trees import get_path

    tokens = np.zeros((1, 1), np.int32)
    init = jax.jit(Griffin(LARGE).init)
    params = init(jax.random.key(0), tokens, tokens)["params"]
    specs = layer_spec(LARGE)
    assert len(jax.tree.leaves(params)) == len(specs)
    flat = {spec.path: np.asarray(get_path(params, spec.path)) for spec in specs}
    assert {path: value.shape for path, value in flat.items()} == {s.path: s.shape for s in specs}
    assert {str(value.dtype) for value in flat.values()} == {"float32"}
    check_distributions(flat, LARGE)
    # Its keys differ: no two parameters of one shape are alike.
    assert (flat["blocks.0.mlp_block.ffw_up.w"] != flat["blocks.1.mlp_block.ffw_up.w"]).any()


def test_torch_modules_draw_from_the_global_generator() -> None:
    pytest.importorskip("torch.nn", reason="torch is not installed")
    import torch

    from recurrentgemma.torch import RGLRU, Griffin

    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(Griffin(LARGE).state_dict())
    name = "blocks.0.mlp_block.ffw_up.w"
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0][name], states[2][name])
    # A model leaves the generator as it is; a layer alone draws one number, as torch's own do.
    before = torch.get_rng_state()
    Griffin(LARGE)
    assert torch.equal(torch.get_rng_state(), before)
    one, other = (RGLRU(*sizes("RGLRU", LARGE, "")).a_param for _ in range(2))
    assert not torch.equal(one, other)
    decoded = {
        spec.path: to_torch(spec.path, states[0][torch_name(spec.path)].numpy())
        for spec in layer_spec(LARGE)
    }
    check_distributions(decoded, LARGE)


A_PARAM = "blocks.0.recurrent_block.rg_lru.a_param"


def test_a_param_in_bfloat16_keeps_its_values(backend: Backend) -> None:
    """Computed in float32 and then rounded; in bfloat16 all along, 14 values are left."""
    exact = backend.init_params(MANY_CHANNELS, 0)[A_PARAM]
    rounded = backend.init_params(MANY_CHANNELS, 0, "bfloat16")[A_PARAM]
    assert str(rounded.dtype) == "bfloat16"
    assert len(np.unique(rounded.astype(np.float32))) > 100
    np.testing.assert_allclose(rounded.astype(np.float32), exact, rtol=2**-8)


def test_a_param_in_bfloat16_keeps_its_values_in_flax() -> None:
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    import jax
    import jax.numpy as jnp

    from recurrentgemma.jax import RGLRU

    arguments = sizes("RGLRU", MANY_CHANNELS, "")
    unit = RGLRU(*arguments, param_dtype=jnp.bfloat16)
    x, segment_pos = jnp.zeros((1, 1, MANY_CHANNELS.lru_width)), jnp.zeros((1, 1), jnp.int32)
    variables = jax.jit(unit.init)(jax.random.key(0), x, segment_pos)
    a_param = variables["params"]["a_param"]
    assert a_param.dtype == jnp.bfloat16
    values = np.asarray(a_param.astype(jnp.float32))
    assert len(np.unique(values)) > 100
    check_ring(values.astype(np.float64))


def test_meta_models_have_no_values() -> None:
    pytest.importorskip("torch.nn", reason="torch is not installed")
    from recurrentgemma.torch import Griffin

    model = Griffin(GriffinConfig.from_preset("RECURRENT_GEMMA_9B_V1"), device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["Griffin", "RMSNorm", "RecurrentBlock", "LocalAttentionBlock"])
@pytest.mark.parametrize("where", ["device", "default", "fake"])
def test_modules_have_no_values_where_none_can_be(where: str, name: str) -> None:
    """On the meta device by `torch.device` or by default, and among fake tensors."""
    pytest.importorskip("torch.nn", reason="torch is not installed")
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    import recurrentgemma.torch

    config = CONFIGS["griffin"]
    arguments = (config,) if name == "Griffin" else sizes(name, config, "")
    generator = torch.get_rng_state()
    modes = {"device": torch.device("meta"), "fake": FakeTensorMode()}
    torch.set_default_device("meta" if where == "default" else None)
    try:
        with modes.get(where, contextlib.nullcontext()):
            module = getattr(recurrentgemma.torch, name)(*arguments)
            module.reset_parameters()
    finally:
        torch.set_default_device(None)
    for parameter in module.parameters():
        assert isinstance(parameter, FakeTensor) if where == "fake" else parameter.is_meta
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_meta_model_that_is_given_memory_is_initialised() -> None:
    pytest.importorskip("torch.nn", reason="torch is not installed")
    import torch

    from recurrentgemma.torch import Griffin

    with torch.device("meta"):
        model = Griffin(LARGE)
    torch.manual_seed(3)
    model.to_empty(device="cpu").reset_parameters()
    torch.manual_seed(3)
    for name, value in Griffin(LARGE).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
