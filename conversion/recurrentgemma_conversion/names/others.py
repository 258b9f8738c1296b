"""Models that are not read, and how a checkpoint tells that it holds one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from recurrentgemma.common.errors import OtherModelError

# How each begins its type in Hugging Face's config, or its architecture in a GGUF.
_TYPES = {
    "gemma3n": "Gemma 3n",
    "gemma4": "Gemma 4",
    "paligemma": "PaliGemma",
    "t5gemma": "T5Gemma",
    "t5_gemma": "T5Gemma",
    "vaultgemma": "VaultGemma",
    "shieldgemma2": "ShieldGemma 2",
    "embedding_gemma": "EmbeddingGemma",
    "embeddinggemma": "EmbeddingGemma",
    "gemma-embedding": "EmbeddingGemma",
    "diffusion_gemma": "DiffusionGemma",
    "clip": "the vision encoder of a model",
}
# Parts of tensors' names that no other model has.
_MARKS = {
    "laurel": "Gemma 3n",
    "altup": "Gemma 3n",
    "layer_scalar": "Gemma 4",
    "skip_scale": "Gemma 4",
    "multi_modal_projector.linear.": "PaliGemma",
    "cross_attn": "T5Gemma",
    "decoder.layers.0.pre_self_attn_layernorm": "T5Gemma",
}


def other_model(path: Path, field: str, got: object, known: Iterable[str]) -> OtherModelError:
    """The error that a checkpoint states another model than the known ones."""
    kind = str(got)
    name = next((_TYPES[start] for start in _TYPES if kind.startswith(start)), None)
    what = f"holds {name}, which is not read" if name else "holds a model that is not read"
    choices = ", ".join(map(repr, known))
    return OtherModelError(f"{path} {what}: {field} must be one of {choices}, got {got!r}")


def require_no_other(path: Path, names: Iterable[str]) -> None:
    """Raises `OtherModelError` for the tensors of a model that is not read."""
    for name in names:
        dotted = name.replace("/", ".")
        model = next((_MARKS[mark] for mark in _MARKS if mark in dotted), None)
        if model is not None:
            raise OtherModelError(f"{path} holds {model}, which is not read: it has {name!r}")
