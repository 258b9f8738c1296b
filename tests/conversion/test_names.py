"""What the formats call parameters, and what a table of names can say."""

import numpy as np
import pytest
from cases import CONFIGS, make_config, make_params
from checkpoints import decoded

from recurrentgemma.common.errors import ConfigError, MismatchError
from recurrentgemma.common.io.arrays import DTYPES
from recurrentgemma.common.model.init import Zeros
from recurrentgemma.common.model.layer_spec import ParamSpec
from recurrentgemma_conversion import Format
from recurrentgemma_conversion.convert import WRITERS
from recurrentgemma_conversion.formats import Tensor
from recurrentgemma_conversion.names import layout
from recurrentgemma_conversion.names.table import Layout, Rule, lay_out

CONFIG = make_config("RA")
BLOCK, LAYER = "blocks.0.recurrent_block", "model.layers.0"
# Path, and name in Hugging Face.
SAME = [
    ("embedder.input_embedding", "model.embed_tokens.weight"),
    ("final_norm.scale", "model.final_norm.weight"),
    (f"{BLOCK}.rg_lru.a_param", f"{LAYER}.temporal_block.rg_lru.recurrent_param"),
    (f"{BLOCK}.rg_lru.a_gate.w", f"{LAYER}.temporal_block.rg_lru.recurrent_gate_weight"),
    (f"{BLOCK}.rg_lru.a_gate.b", f"{LAYER}.temporal_block.rg_lru.recurrent_gate_bias"),
    (f"{BLOCK}.rg_lru.input_gate.w", f"{LAYER}.temporal_block.rg_lru.input_gate_weight"),
    (f"{BLOCK}.linear_x.bias", f"{LAYER}.temporal_block.linear_x.bias"),
    (f"{BLOCK}.conv_1d.b", f"{LAYER}.temporal_block.conv_1d.bias"),
    ("blocks.0.temporal_pre_norm.scale", f"{LAYER}.temporal_pre_norm.weight"),
    ("blocks.1.channel_pre_norm.scale", "model.layers.1.channel_pre_norm.weight"),
    ("blocks.0.mlp_block.ffw_down.bias", f"{LAYER}.mlp_block.down_proj.bias"),
]
TURNED = [
    (f"{BLOCK}.linear_out", f"{LAYER}.temporal_block.linear_out.weight"),
    ("blocks.1.attention_block.proj_q", "model.layers.1.temporal_block.q_proj.weight"),
    ("blocks.1.attention_block.proj_k", "model.layers.1.temporal_block.k_proj.weight"),
    ("blocks.1.attention_block.proj_final", "model.layers.1.temporal_block.o_proj.weight"),
    ("blocks.0.mlp_block.ffw_down", f"{LAYER}.mlp_block.down_proj.weight"),
]


def stored(format_: Format) -> dict[str, np.ndarray]:
    names, params = layout(CONFIG, format_), make_params(CONFIG)
    return {n: np.asarray(t) for n, t in names.encode(lambda spec: params[spec.path])}


def test_names_and_axes_in_the_formats() -> None:
    """The published names."""
    params = make_params(CONFIG)
    torch, hf = stored(Format.KAGGLE_TORCH), stored(Format.HUGGINGFACE)
    assert list(stored(Format.KAGGLE_FLAX)) == list(params)
    assert list(stored(Format.RECURRENTGEMMA)) == list(torch)
    for path, theirs in SAME:
        np.testing.assert_array_equal(torch[path], params[path])
        np.testing.assert_array_equal(hf[theirs], params[path])
    for path, theirs in TURNED:
        kernel = params[f"{path}.kernel"]
        np.testing.assert_array_equal(torch[f"{path}.weight"], kernel.T)
        np.testing.assert_array_equal(hf[theirs], kernel.T)
    taps, up = params[f"{BLOCK}.conv_1d.w"], "blocks.0.mlp_block.ffw_up"
    np.testing.assert_array_equal(torch[f"{BLOCK}.conv_1d.w"], taps)
    np.testing.assert_array_equal(hf[f"{LAYER}.temporal_block.conv_1d.weight"], taps.T[:, None])
    for half, name in enumerate(("gate_proj", "up_proj")):
        w, b = params[f"{up}.w"][half], params[f"{up}.b"][half, 0, 0]
        np.testing.assert_array_equal(hf[f"{LAYER}.mlp_block.{name}.weight"], w.T)
        np.testing.assert_array_equal(hf[f"{LAYER}.mlp_block.{name}.bias"], b)
    np.testing.assert_array_equal(torch[f"{up}.w"], params[f"{up}.w"])


@pytest.mark.parametrize("format_", WRITERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_decode_undoes_encode(name: str, format_: Format) -> None:
    config, params = CONFIGS[name], make_params(CONFIGS[name])
    names = layout(config, format_)
    tensors = {n: np.asarray(t) for n, t in names.encode(lambda spec: params[spec.path])}
    assert {n: tensor.shape for n, tensor in tensors.items()} == dict(names.shapes)
    assert list(tensors) == list(names.shapes)
    back = decoded(config, format_, tensors)
    assert list(back) == list(params)
    for path, value in params.items():
        np.testing.assert_array_equal(back[path], value, err_msg=path)
    views = [names.decode(spec, tensors.__getitem__) for spec in names.specs]
    assert all(
        any(np.shares_memory(row, tensor) for tensor in tensors.values())
        for view in views
        for row in (view if hasattr(view, "_rows") else [view])
    )


# A layer of another family: D = 6, two heads of 4 that share one key head, M = 5.
D, N, K, H, M = 6, 2, 1, 4, 5
SHAPES = {
    "blocks.3.pre_norm.scale": (D,),
    "blocks.3.attention_block.proj_q.kernel": (D, N * H),
    "blocks.3.attention_block.proj_k.kernel": (D, K * H),
    "blocks.3.attention_block.proj_v.kernel": (D, K * H),
    "blocks.3.attention_block.proj_final.kernel": (N * H, D),
    "blocks.3.mlp_block.ffw_up.w": (2, D, M),
}
Q, K_, V = (f"blocks.*.attention_block.proj_{name}.kernel" for name in "qkv")
NORM, OUT, UP = (
    "blocks.*.pre_norm.scale",
    "blocks.*.attention_block.proj_final.kernel",
    "blocks.*.mlp_block.ffw_up.w",
)
SPECS = [ParamSpec(path, shape, Zeros(), ("",) * len(shape)) for path, shape in SHAPES.items()]
PARAMS = {s.path: np.random.default_rng(0).normal(size=s.shape) for s in SPECS}
FLAX = [
    Rule((NORM,), ("layer_*/norm/scale",)),
    Rule((Q,), ("layer_*/q_einsum/w",), "d (n h) -> n d h"),
    Rule((K_, V), ("layer_*/kv_einsum/w",), "d (k h) -> 1 k d h"),
    Rule((OUT,), ("layer_*/attn_vec_einsum/w",), "(n h) d -> n h d"),
    Rule((UP,), ("layer_*/gating_einsum/w",), "g d m -> g m d"),
]
FUSED = [
    Rule((NORM,), ("layers.*.norm.weight",), add=1.0),
    Rule((Q, K_, V), ("layers.*.qkv_proj.weight",), "i o -> o i"),
    Rule((OUT,), ("layers.*.o_proj.weight",), "i o -> o i"),
    Rule((UP,), ("layers.*.gate_proj.weight", "layers.*.up_proj.weight"), "i o -> o i"),
]


def lay(rules: list[Rule]) -> Layout:
    return lay_out(SPECS, rules, Format.HUGGINGFACE, lambda block: {"h": H})


@pytest.mark.parametrize("rules", [FLAX, FUSED], ids=["flax", "fused"])
def test_tables_of_other_families(rules: list[Rule]) -> None:
    """Split, stacked, fused and permuted tensors, and norms that are stored with 1 added."""
    q, k, v, out = (
        PARAMS[f"blocks.3.attention_block.proj_{name}.kernel"] for name in ("q", "k", "v", "final")
    )
    up, norm = PARAMS["blocks.3.mlp_block.ffw_up.w"], PARAMS["blocks.3.pre_norm.scale"]
    if rules is FLAX:
        expected = {
            "layer_3/norm/scale": norm,
            "layer_3/q_einsum/w": q.reshape(D, N, H).transpose(1, 0, 2),
            "layer_3/kv_einsum/w": np.stack(
                [k.reshape(D, K, H).transpose(1, 0, 2), v.reshape(D, K, H).transpose(1, 0, 2)]
            ),
            "layer_3/attn_vec_einsum/w": out.reshape(N, H, D),
            "layer_3/gating_einsum/w": up.swapaxes(1, 2),
        }
    else:
        expected = {
            "layers.3.norm.weight": norm + 1,
            "layers.3.qkv_proj.weight": np.concatenate([q.T, k.T, v.T]),
            "layers.3.o_proj.weight": out.T,
            "layers.3.gate_proj.weight": up[0].T,
            "layers.3.up_proj.weight": up[1].T,
        }
    names = lay(rules)
    tensors = {n: np.asarray(t) for n, t in names.encode(lambda spec: PARAMS[spec.path])}
    assert list(tensors) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)
        assert names.shapes[name] == tensor.shape
    for spec in SPECS:
        value = np.asarray(names.decode(spec, tensors.__getitem__))
        np.testing.assert_allclose(value, PARAMS[spec.path], rtol=1e-12, err_msg=spec.path)


def test_parameters_without_names_are_all_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        lay([rule for rule in FUSED if rule.ours not in ((NORM,), (OUT,))])
    assert str(caught.value) == (
        "huggingface has no names for blocks.3.pre_norm.scale, "
        "blocks.3.attention_block.proj_final.kernel"
    )


def test_parameters_in_one_tensor_have_one_dtype() -> None:
    dtypes = {spec.path: DTYPES["float32"] for spec in SPECS}
    assert {dtype for _, dtype in lay(FUSED).tensors(dtypes).values()} == {DTYPES["float32"]}
    dtypes["blocks.3.attention_block.proj_k.kernel"] = DTYPES["bfloat16"]
    with pytest.raises(
        MismatchError,
        match=r"share a tensor must have one dtype (.*)\s+layers\.3\.qkv_proj\.weight",
    ):
        lay(FUSED).tensors(dtypes)


def test_parts_of_one_parameter_have_one_dtype() -> None:
    names = lay(FUSED)
    tensors = {name: Tensor(shape, DTYPES["float32"]) for name, shape in names.shapes.items()}
    assert set(names.dtypes("it", tensors).values()) == {DTYPES["float32"]}
    tensors["layers.3.up_proj.weight"] = Tensor((M, D), DTYPES["bfloat16"])
    with pytest.raises(MismatchError, match=r"ffw_up\.w must have one dtype in all its parts"):
        names.dtypes("it", tensors)
