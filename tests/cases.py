"""What the tests run on: small configs, weights without zeros, batches with every oddity."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from recurrentgemma.common.model import reference
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.init import Zeros
from recurrentgemma.common.model.layer_spec import sample_params
from recurrentgemma.common.model.presets import Preset

GRIFFINS = [preset for preset in Preset if "block_types" in preset.config_dict]
BLOCKS = {"R": "recurrent", "A": "attention"}


def make_config(blocks: str = "RRA", **changes) -> GriffinConfig:
    """Small, with every part of the model; sqrt(24) and sqrt(40) are not exact in bfloat16."""
    fields = {
        "vocab_size": 31,
        "width": 24,
        "mlp_expanded_width": 32,
        "num_heads": 2,
        "block_types": tuple(BLOCKS[letter] for letter in blocks),
        "embeddings_scale_by_sqrt_dim": True,
        "attention_window_size": 8,
        "logits_soft_cap": 5.0,
    }
    return GriffinConfig(**fields | changes)


CONFIGS = {
    "griffin": make_config(),
    "attention_last": make_config(
        "RA", width=40, lru_width=24, attention_window_size=5, logits_soft_cap=0.0
    ),
    "attention_first": make_config("AR", width=16, num_heads=1, lru_width=32),
    "recurrent": make_config(
        "RR", num_heads=3, lru_width=36, embeddings_scale_by_sqrt_dim=False, logits_soft_cap=0.0
    ),
    "attention": make_config(
        "AA",
        width=32,
        num_heads=4,
        attention_window_size=4,
        embeddings_scale_by_sqrt_dim=False,
    ),
}


@functools.lru_cache(maxsize=32)
def make_params(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Initial values, with noise where those are zero: on biases and scales. Read-only."""
    rng = np.random.default_rng(seed)
    params = {}
    for spec, value in sample_params(config, seed):
        noise = 0.2 * rng.standard_normal(spec.shape) if isinstance(spec.init, Zeros) else 0.0
        params[spec.path] = value.astype(np.float64) + noise
        params[spec.path].flags.writeable = False
    return params


def bfloat16(value: np.ndarray) -> np.ndarray:
    """To bfloat16 and back: the nearest numbers of 8 significant bits, ties to even."""
    fraction, exponent = np.frexp(value)
    return np.ldexp(np.round(fraction * 2**8), exponent - 8)


def scaled_to(
    config: GriffinConfig, params: dict[str, np.ndarray], tokens, segment_pos, magnitude: float
) -> dict[str, np.ndarray]:
    """The parameters with a final norm that gives these tokens uncapped logits of a magnitude."""
    uncapped = dataclasses.replace(config, logits_soft_cap=0.0)
    logits, _ = reference.forward(uncapped, params, tokens, segment_pos)
    factor = magnitude / np.abs(logits).max()
    return params | {"final_norm.scale": (1 + params["final_norm.scale"]) * factor - 1}


def positions(lengths: Sequence[int], padding: int = 0) -> list[int]:
    """A row: padding, then documents of these lengths."""
    return [-1] * padding + [place for length in lengths for place in range(length)]


def make_tokens(config: Config, *shape: int, seed: int = 0) -> np.ndarray:
    """Random token ids, int32."""
    return np.random.default_rng(seed).integers(config.vocab_size, size=shape, dtype=np.int32)


def make_batch(config: Config, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions of three rows: one document, three documents, and a padded one."""
    first, second = (length + 2) // 3, (length + 1) // 3
    padding = max(1, length // 4)
    rows = [
        positions([length]),
        positions([first, second, length - first - second]),
        positions([length - padding], padding),
    ]
    return make_tokens(config, 3, length), np.array(rows, np.int32)


def next_token_loss(
    logits: np.ndarray, tokens: np.ndarray, mask: np.ndarray
) -> tuple[float, np.ndarray]:
    """The mean over the mask [B, T - 1] of each next token's surprise, and d loss / d logits."""
    logits = np.asarray(logits, np.float64)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = exp / exp.sum(-1, keepdims=True)
    target = np.eye(logits.shape[-1])[tokens[:, 1:]]
    chosen = (probabilities[:, :-1] * target).sum(-1)
    gradient = np.zeros_like(logits)
    gradient[:, :-1] = (probabilities[:, :-1] - target) * mask[..., None] / mask.sum()
    # Only where the mask counts: what stands at padding is no probability of anything.
    nll = -np.log(np.where(mask > 0, chosen, 1.0))
    gradient[:, :-1] = np.where(mask[..., None] > 0, gradient[:, :-1], 0.0)
    return float((nll * mask).sum() / mask.sum()), gradient
