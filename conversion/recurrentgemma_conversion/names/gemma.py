"""Gemma 1, 2 and 3 in the formats: names and axes of their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from recurrentgemma.common.model.gemma import GemmaConfig
from recurrentgemma_conversion.formats import Format
from recurrentgemma_conversion.names.family import Family
from recurrentgemma_conversion.names.gemma_config import (
    from_fields,
    release,
    resolve,
    sized,
    to_fields,
)
from recurrentgemma_conversion.names.gemma_gguf import from_metadata
from recurrentgemma_conversion.names.table import Rule

_T = "i o -> o i"  # torch.nn.Linear holds the transpose of a Flax kernel
_ATTENTION = "blocks.*.attention_block."
_QKV = tuple(f"{_ATTENTION}proj_{letter}.kernel" for letter in "qkv")
_UP, _DOWN = "blocks.*.mlp_block.ffw_up.w", "blocks.*.mlp_block.ffw_down.kernel"


def _norms(config: GemmaConfig, names: Mapping[str, str], add: float = 0.0) -> Iterator[Rule]:
    """The norms that a version has, each under the name that follows from what it norms."""
    ours = ["temporal_pre", "channel_pre"]
    ours += ["temporal_post", "channel_post"] if config.version > 1 else []
    for norm in ours:
        yield Rule((f"blocks.*.{norm}_norm.scale",), (names[norm],), add=add)
    if config.version > 2:
        for letter in "qk":
            yield Rule((f"{_ATTENTION}{letter}_norm.scale",), (names[letter],), add=add)


def _layers(config: GemmaConfig, model: str, q_norm: str, k_norm: str) -> Iterator[Rule]:
    """What Hugging Face and `gemma_pytorch` call alike, below the name of the decoder."""
    layer = f"{model}layers.*."
    # Gemma 1 calls the norm before the MLP by its place after attention.
    after = "post_attention_layernorm.weight"
    norms = {
        "temporal_pre": "input_layernorm.weight",
        "channel_pre": after if config.version == 1 else "pre_feedforward_layernorm.weight",
        "temporal_post": after,
        "channel_post": "post_feedforward_layernorm.weight",
        "q": f"self_attn.{q_norm}.weight",
        "k": f"self_attn.{k_norm}.weight",
    }
    yield from _norms(config, {ours: layer + theirs for ours, theirs in norms.items()})
    halves = tuple(f"{layer}mlp.{half}_proj.weight" for half in ("gate", "up"))
    yield Rule((_UP,), halves, _T)
    yield Rule((_DOWN,), (f"{layer}mlp.down_proj.weight",), _T)
    out = f"{layer}self_attn.o_proj.weight"
    yield Rule((f"{_ATTENTION}proj_final.kernel",), (out,), _T)
    yield Rule(("final_norm.scale",), (f"{model}norm.weight",))


def huggingface(config: GemmaConfig) -> Iterator[Rule]:
    """Hugging Face's names; in a model that also sees, those of its decoder."""
    for model in ("model.", "language_model.model.", "model.language_model."):
        yield Rule(("embedder.input_embedding",), (f"{model}embed_tokens.weight",))
        yield from _layers(config, model, "q_norm", "k_norm")
        for ours, letter in zip(_QKV, "qkv", strict=True):
            yield Rule((ours,), (f"{model}layers.*.self_attn.{letter}_proj.weight",), _T)


def gemma_pytorch(config: GemmaConfig) -> Iterator[Rule]:
    """The names of `gemma_pytorch`, which fuses queries, keys and values."""
    for embedder in ("embedder", "text_token_embedder"):
        yield Rule(("embedder.input_embedding",), (f"{embedder}.weight",))
    yield from _layers(config, "model.", "query_norm", "key_norm")
    yield Rule(_QKV, ("model.layers.*.self_attn.qkv_proj.weight",), _T)


def flax(config: GemmaConfig) -> Iterator[Rule]:
    """The names of Kaggle's archives, flat keys and an older tree, then of the library `gemma`."""
    for top, slash, w in (("transformer/", "/", ".w"), ("transformer.", ".", ".w"), ("", ".", "")):
        layer = f"{top}layer_*{slash}"
        attention, mlp = f"{layer}attn{slash}", f"{layer}mlp{slash}"
        norms = {
            "temporal_pre": f"{layer}pre_attention_norm.scale",
            "channel_pre": f"{layer}pre_ffw_norm.scale",
            "temporal_post": f"{layer}post_attention_norm.scale",
            "channel_post": f"{layer}post_ffw_norm.scale",
            "q": f"{attention}_query_norm.scale",
            "k": f"{attention}_key_norm.scale",
        }
        yield from _norms(config, norms)
        yield Rule(("embedder.input_embedding",), (f"{top}embedder.input_embedding",))
        yield Rule(("final_norm.scale",), (f"{top}final_norm.scale",))
        # One tensor where there are as many key heads as query heads.
        yield Rule(_QKV, (f"{attention}qkv_einsum.w",), "d (n h) -> 1 n d h")
        yield Rule(_QKV[:1], (f"{attention}q_einsum.w",), "d (n h) -> n d h")
        yield Rule(_QKV[1:], (f"{attention}kv_einsum.w",), "d (n h) -> 1 n d h")
        out = f"{attention}attn_vec_einsum.w"
        yield Rule((f"{_ATTENTION}proj_final.kernel",), (out,), "(n h) d -> n h d")
        turns = ["g d m -> g m d", ""]  # the older models have the parameter's own axes
        old = config.version == 1 or (config.version, config.num_layers) == (2, 26)
        for axes in reversed(turns) if old else turns:
            yield Rule((_UP,), (f"{mlp}gating_einsum{w}",), axes)
        yield Rule((_DOWN,), (f"{mlp}linear{w}",))


def gguf(config: GemmaConfig) -> Iterator[Rule]:
    """The names of llama.cpp, whose norms are stored with the one that is added to them."""
    layer = "blk.*."
    norms = {
        "temporal_pre": "attn_norm",
        "channel_pre": "ffn_norm",
        "temporal_post": "post_attention_norm",
        "channel_post": "post_ffw_norm",
        "q": "attn_q_norm",
        "k": "attn_k_norm",
    }
    yield from _norms(config, {ours: f"{layer}{n}.weight" for ours, n in norms.items()}, add=1.0)
    yield Rule(("final_norm.scale",), ("output_norm.weight",), add=1.0)
    yield Rule(("embedder.input_embedding",), ("token_embd.weight",))
    for ours, letter in zip(_QKV, "qkv", strict=True):
        yield Rule((ours,), (f"{layer}attn_{letter}.weight",), _T)
    yield Rule((f"{_ATTENTION}proj_final.kernel",), (f"{layer}attn_output.weight",), _T)
    yield Rule((_UP,), (f"{layer}ffn_gate.weight", f"{layer}ffn_up.weight"), _T)
    yield Rule((_DOWN,), (f"{layer}ffn_down.weight",), _T)


GEMMA = Family(
    config=GemmaConfig,
    model_types=("gemma", "gemma2", "gemma3_text", "gemma3"),
    tables={
        Format.HUGGINGFACE: lambda config: list(huggingface(config)),
        Format.KAGGLE_TORCH: lambda config: list(gemma_pytorch(config)),
        Format.KAGGLE_FLAX: lambda config: list(flax(config)),
        Format.GGUF: lambda config: list(gguf(config)),
    },
    resolve=resolve,
    sized=sized,
    from_fields=from_fields,
    to_fields=to_fields,
    release=release,
    sizes=lambda config, block: {"h": config.head_dim},
    marks=("self_attn.", "attn_vec_einsum", "layer_0"),
    other_parts=r"(^|[./])(vision_\w+|siglip\w*|SigLiP\w*|multi_modal_projector|mm_\w+)([./]|$)",
    buffers=r"(^|\.)((local_|global_)?freqs_cis|rotary_emb\.inv_freq)$",
    level="model_state_dict",
    modules={"attention_block": "self_attn", "mlp_block": "mlp", "final_norm": "norm"},
    architectures=("gemma", "gemma2", "gemma3"),
    from_metadata=from_metadata,
)
