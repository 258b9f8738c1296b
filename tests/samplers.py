"""Samplers of both twins on one small model with random weights."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import sentencepiece as spm

from recurrentgemma.common.io.checkpoint import BUNDLED
from recurrentgemma.common.model.config import Config, Layer, ModelConfig
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.mixers import Attention, Recurrent, Rope

SUBMODULES = {"jax": "jax.numpy", "torch": "torch.nn"}
PROMPTS = ["In the beginning", "", "x", "It is a truth universally acknowledged, that a man"]
STEPS = 12
CONFIG = GriffinConfig(
    vocab_size=2048,
    width=32,
    mlp_expanded_width=48,
    num_heads=2,
    block_types=("recurrent", "attention"),  # pyright: ignore[reportArgumentType]
    embeddings_scale_by_sqrt_dim=True,
    attention_window_size=8,
    logits_soft_cap=30.0,
)

# Attention without a window: its state grows with the text.
ATTENTION = Attention(
    heads=2, kv_heads=1, head_dim=16, reach=None, rope=Rope(10_000.0, 1.0, 1.0), scale=0.25
)
LAYERS = (
    Layer(ATTENTION, mlp=48, mlp_bias=False),
    Layer(Recurrent(width=32, gate_blocks=2, taps=4), mlp=48, mlp_bias=True),
)
UNBOUNDED = ModelConfig(
    vocab_size=CONFIG.vocab_size, width=32, layers=LAYERS, embedding_scale=5.5, soft_cap=30.0
)


def make_sampler(
    twin: str,
    *,
    config: Config = CONFIG,
    vocab=None,
    dtype: str = "float32",
    seed: int = 3,
    **kwargs,
):
    module = importlib.import_module(f"recurrentgemma.{twin}")
    if vocab is None:
        vocab = spm.SentencePieceProcessor(model_file=str(BUNDLED / "tokenizer.model"))
    if twin == "jax":
        params = module.init_params(config, seed, dtype)
        model = module.Griffin(config, param_dtype=dtype)
        return module.Sampler(model=model, vocab=vocab, params=params, **kwargs)
    import torch

    model = module.Griffin(config, dtype=getattr(torch, dtype))
    model.reset_parameters(seed)
    return module.Sampler(model=model, vocab=vocab, **kwargs)


@functools.cache
def sampling_function(twin: str, name: str, *static: int) -> Callable[..., Any]:
    """A function of a twin's `sampling`, compiled as in a sampler: each shape is one program."""
    function = getattr(importlib.import_module(f"recurrentgemma.{twin}.sampling"), name)
    if twin == "torch":
        return function
    import jax

    return jax.jit(function, static_argnums=static)


def lists(tokens) -> list[list[int]]:
    return [np.asarray(row).tolist() for row in tokens]


def generate(sampler, prompts=PROMPTS, steps=STEPS, **kwargs) -> list[list[int]]:
    return lists(sampler(prompts, steps, **kwargs).tokens)


def without_eos(sampler, prompts=PROMPTS, steps=STEPS) -> list[list[int]]:
    return generate(sampler, prompts, steps, end_sampling_at_eos_token=False)


def saying(sampler, tokens) -> None:
    """Makes a sampler say these tokens, in one row."""
    said, choose = iter(tokens), sampler.engine.choose

    def chosen(*args):
        sampled, seen = choose(*args)
        return sampled._replace(tokens=sampler.engine.on_device(np.array([next(said)]))), seen

    sampler.engine.choose = chosen
