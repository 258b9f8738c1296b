"""Against the RecurrentGemma of `transformers`, an implementation from outside.

Its port admits one key fewer than the published code, so it gets a window of W + 1; and it has rows
without padding and of one document, one at a time, which is what it gets right.
"""

import dataclasses
import functools

import numpy as np
import pytest
from cases import bfloat16, make_config, make_params, make_tokens, scaled_to
from sweeps import sweep

from backends import Backend
from recurrentgemma.common.model import reference
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.parity.transformers_model import with_cache
from recurrentgemma_conversion import Format
from recurrentgemma_conversion.names import layout
from tolerances import assert_close

CONFIGS = {
    "three blocks": make_config("RRA", width=48, attention_window_size=6, logits_soft_cap=30.0),
    "five blocks": make_config("RRARR", width=64, attention_window_size=16, logits_soft_cap=30.0),
    "attention first": make_config(
        "AR", width=64, num_heads=4, attention_window_size=8, logits_soft_cap=30.0
    ),
}
PREFILL, STEPS = 40, 12  # both past every window
ROWS, SEEDS = 8, 3


@functools.cache
def problem(config: GriffinConfig, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Weights, rounded to bfloat16 so that every dtype holds them, and tokens."""
    tokens = make_tokens(config, ROWS, PREFILL + STEPS, seed=seed)
    params = scaled_to(config, make_params(config, seed), tokens, places(), 45)
    return {path: bfloat16(value) for path, value in params.items()}, tokens


def places() -> np.ndarray:
    return np.tile(np.arange(PREFILL + STEPS, dtype=np.int32), (ROWS, 1))


@functools.cache
def truth(config: GriffinConfig, seed: int = 0) -> np.ndarray:
    params, tokens = problem(config, seed)
    logits, _ = reference.forward(config, params, tokens, places())
    assert 25 < np.abs(logits).max() < 30
    return logits


@functools.cache
def theirs(
    config: GriffinConfig, dtype: str, attention: str, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of one pass over everything; of a prefill and cached decoding."""
    pytest.importorskip("torch.nn", reason="torch is not installed")
    import torch

    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=2 * config.mlp_expanded_width,
            num_attention_heads=config.num_heads,
            num_key_value_heads=1,
            lru_width=config.lru_width,
            attention_window_size=config.attention_window_size + 1,
            logits_soft_cap=config.logits_soft_cap,
            block_types=[block.value for block in config.block_types],
            num_hidden_layers=config.num_layers,
            attn_implementation=attention,
        )
    )
    params, tokens = problem(config, seed)
    stored = layout(config, Format.HUGGINGFACE).encode(lambda spec: params[spec.path])
    state = {name: torch.tensor(np.array(tensor)) for name, tensor in stored}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model = model.to(getattr(torch, dtype)).eval()
    whole, cached = [], []
    with torch.no_grad():
        for ids in torch.tensor(tokens, dtype=torch.long).split(1):
            whole.append(model(ids, use_cache=False).logits)
            cache = transformers.DynamicCache(config=model.config)
            parts = []
            for part in chunks():
                position_ids = torch.arange(part.start, part.stop)[None]
                kwargs = {"use_cache": True, **with_cache(model, cache)}
                parts.append(model(ids[:, part], position_ids=position_ids, **kwargs).logits)
            cached.append(torch.cat(parts, 1))
    return torch.cat(whole).double().numpy(), torch.cat(cached).double().numpy()


def chunks() -> list[slice]:
    return [slice(0, PREFILL), *(slice(t, t + 1) for t in range(PREFILL, PREFILL + STEPS))]


@functools.cache
def ours(
    backend: Backend, config: GriffinConfig, dtype: str, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    params, tokens = problem(config, seed)
    model = backend.griffin(config, params, dtype)
    whole, _ = model(tokens, places())
    parts: list[np.ndarray] = []
    state = None
    for part in chunks():
        logits, state = model(tokens[:, part], places()[:, part], state)
        parts.append(logits)
    return whole, np.concatenate(parts, 1)


@pytest.mark.parametrize(
    ("name", "attention"),
    sweep(
        [("three blocks", "eager"), ("attention first", "eager"), ("five blocks", "sdpa")],
        [(name, attention) for name in CONFIGS for attention in ("eager", "sdpa")],
    ),
)
def test_float32(backend: Backend, name: str, attention: str) -> None:
    config = CONFIGS[name]
    whole, cached = ours(backend, config, "float32")
    their_whole, their_cached = theirs(config, "float32", attention)
    assert_close(whole, their_whole, "logits", "float32", name="one pass")
    assert_close(cached, their_cached, "logits", "float32", name="prefill and decode")
    assert_close(cached, truth(config), "logits", "float32", name="the reference")


def test_its_window_admits_one_key_fewer() -> None:
    """Otherwise the window of W + 1 above would hide an error."""
    config = CONFIGS["three blocks"]
    changed = dataclasses.replace(config, attention_window_size=7)
    params, tokens = problem(config)
    other, _ = reference.forward(changed, params, tokens, places())
    apart = np.abs(other - truth(config)).max((0, 2))
    assert apart[:7].max() == 0
    assert apart[7:].max() > 0.1


@pytest.mark.parametrize("name", sweep(["three blocks", "attention first"], [*CONFIGS]))
def test_bfloat16_errs_no_more(backend: Backend, name: str) -> None:
    """Against float64 on the same weights: the root mean square, and the largest of a row.

    A row's largest error is a matter of chance, so it is the mean over the rows of several models.
    """
    config = CONFIGS[name]

    def errors(results: list[tuple[np.ndarray, np.ndarray]], kind: int) -> tuple[float, float]:
        error = np.abs([result[kind] - truth(config, seed) for seed, result in enumerate(results)])
        return float(np.sqrt((error**2).mean())), float(error.max((2, 3)).mean())

    our = [ours(backend, config, "bfloat16", seed) for seed in range(SEEDS)]
    their = [theirs(config, "bfloat16", "eager", seed) for seed in range(SEEDS)]
    for kind, what in enumerate(("one pass", "prefill and decode")):
        (mean, largest), (their_mean, their_largest) = errors(our, kind), errors(their, kind)
        assert mean <= their_mean, f"{what}: root mean square {mean}, transformers {their_mean}"
        assert largest <= their_largest, f"{what}: largest {largest}, transformers {their_largest}"
