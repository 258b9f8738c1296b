"""Reading adapters in the layout of PEFT."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recurrentgemma.common.errors import (
    ConfigError,
    DamagedError,
    MismatchError,
    UnknownFormatError,
)
from recurrentgemma.common.io.arrays import DTYPES, dtype_name
from recurrentgemma.common.io.files import expanded
from recurrentgemma.common.io.tensor_files import TensorFile
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import ParamSpec
from recurrentgemma.common.training.adapters import Adapters, require_finite
from recurrentgemma.common.training.lora import (
    MAGNITUDE,
    TARGETS,
    LoraOptions,
    adapter_specs,
    trainable_specs,
)
from recurrentgemma_conversion.formats import Format
from recurrentgemma_conversion.names import layout
from recurrentgemma_conversion.names.table import Piece
from recurrentgemma_conversion.peft import PEFT_CONFIG, PEFT_WEIGHTS, PREFIX, A, B, is_linear
from recurrentgemma_conversion.readers.kaggle_torch import as_array, load_state_dict

PEFT_PICKLE = "adapter_model.bin"
_DORA = "lora_magnitude_vector"
_NAME = re.compile(rf"(?P<module>.+)\.(?P<kind>{A}|{B}|{_DORA})(\.default)?(\.weight)?")

# Fields of `adapter_config.json` that this module reads, and those without an effect on the result
# or with one that the tensors tell.
_READ = (
    *("peft_type", "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora"),
    *("init_lora_weights", "bias"),
)
_WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("task_type", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "megatron_core", "qalora_group_size", "runtime_config", "eva_config"),
    *("corda_config", "loftq_config", "lora_ga_config", "ephemeral_gpu_offload"),
)
# Beginnings that leave the base as it is; the others change it.
_PLAIN_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")


def read_peft(path: str | os.PathLike[str], config: Config) -> Adapters:
    """The adapters in a folder of PEFT's.

    Modules may have ranks and scales of their own (rsLoRA, patterns): smaller ranks are padded with
    zeros, and B takes up a scale that differs. A module of a target without adapters gets zeros.
    DoRA's magnitudes come as arrays named "<path>.lora_magnitude".

    Args:
      path: The folder.
      config: The model that they must belong to.

    Raises:
      ConfigError: `adapter_config.json` is damaged, or asks for something that is not supported
        (all of it is named).
      MismatchError: The adapters do not match the model; all differences are listed.
      CheckpointError: The weights are missing, damaged, or hold NaN or infinity.
    """
    folder = expanded(path)
    fields = _fields(folder / PEFT_CONFIG)
    modules = _modules(folder)
    shapes = {
        f"{name}.weight": (pair.b.shape[0], pair.a.shape[1]) for name, pair in modules.items()
    }
    stored = layout(config, Format.HUGGINGFACE, shapes)
    linear = _linear_layers(stored.specs, stored.pieces)
    problems = [
        f"{name}, which is no linear layer of the model" for name in modules if name not in linear
    ]
    problems += [
        f"{name} of shape {shapes[f'{name}.weight']}, {linear[name][1].shape} is expected"
        for name in modules
        if name in linear and shapes[f"{name}.weight"] != linear[name][1].shape
    ]
    if problems:
        raise MismatchError(f"{folder}: adapters that are not the model's", problems)
    rank = max(pair.a.shape[0] for pair in modules.values())
    scales = {name: _scale(fields, name, pair.a.shape[0]) for name, pair in modules.items()}
    scale = max(scales.values())
    groups = {linear[name][0].lora for name in modules}
    targets = tuple(target for target in TARGETS if target in groups)
    options = LoraOptions(rank, scale * rank, targets)
    specs = trainable_specs(config, options)
    arrays = {spec.path: np.zeros(spec.shape, np.float32) for spec in specs}
    for name, pair in modules.items():
        spec, piece = linear[name]
        part = ... if piece.part is None else piece.part
        a, b = (arrays[matrix.path][part] for matrix in adapter_specs(spec, rank))
        a[:, : len(pair.a)] = pair.a.T
        b[: len(pair.a)] = pair.b.T * np.float32(scales[name] / scale)
    if fields.get("use_dora"):
        arrays |= _magnitudes(folder, modules, linear)
    require_finite(folder, arrays)
    return Adapters(config, options, arrays)


class _Module(NamedTuple):
    """A linear layer's arrays, in float32."""

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None


def _fields(path: Path) -> dict[str, Any]:
    """The fields of `adapter_config.json`."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(fields, dict):
            raise TypeError(f"a JSON object is expected, got {type(fields).__name__}")
        kind, patterns = fields.get("peft_type"), fields.get("alpha_pattern") or {}
        alphas = [fields["lora_alpha"], *patterns.values()]
        if any(isinstance(a, bool) or not isinstance(a, int | float) for a in alphas):
            raise TypeError(f"alphas must be numbers, got {alphas}")
        [re.compile(pattern) for pattern in patterns]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        raise ConfigError(f"{path}: {error!r}") from error
    if kind != "LORA":
        raise ConfigError(f"{path}: peft_type must be LORA, got {kind}")
    problems = {
        name: value
        for name, value in fields.items()
        if name not in (*_READ, *_WITHOUT_EFFECT) and value
    }
    if (fields.get("bias") or "none") != "none":
        problems["bias"] = fields["bias"]
    if fields.get("init_lora_weights", True) not in _PLAIN_BEGINNINGS:
        problems["init_lora_weights"] = fields["init_lora_weights"]
    if problems:
        listed = ", ".join(f"{name}={value!r}" for name, value in problems.items())
        raise ConfigError(f"{path}: adapters with {listed} are not supported")
    return fields


def _scale(fields: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor of B A in a module: a pattern names it whole or by its last parts."""
    alpha = fields["lora_alpha"]
    for pattern, value in (fields.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    if not 0 < alpha < math.inf:
        raise ConfigError(f"lora_alpha must be positive, got {alpha}")
    return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _modules(folder: Path) -> dict[str, _Module]:
    """The adapters by the names of `transformers`' modules."""
    tensors = _tensors_in(folder)
    found: dict[str, dict[str, np.ndarray]] = {}
    others = []
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name.removeprefix(PREFIX))
        if match is None or dtype_name(tensor.dtype) not in DTYPES:
            others.append(name)
        else:
            found.setdefault(match["module"], {})[match["kind"]] = tensor.astype(np.float32)
    if others:
        raise MismatchError(f"{folder} holds more than adapters of linear layers", others)
    if not found:
        raise UnknownFormatError(f"{folder} holds no adapters")
    problems = []
    for name, arrays in found.items():
        a, b = arrays.get(A), arrays.get(B)
        if a is None or b is None:
            problems.append(f"{name} has no {A if a is None else B}")
        elif not (a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] > 0):
            problems.append(f"{name} has {A} {a.shape} and {B} {b.shape}")
    if problems:
        raise MismatchError(f"{folder}: adapters that are not whole", problems)
    return {
        name: _Module(arrays[A], arrays[B], arrays.get(_DORA)) for name, arrays in found.items()
    }


def _tensors_in(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder of PEFT's."""
    if (folder / PEFT_WEIGHTS).is_file():
        file = TensorFile(folder / PEFT_WEIGHTS)
        return {name: file.read(name) for name in file.tensors}
    if (folder / PEFT_PICKLE).is_file():
        return {name: as_array(t) for name, t in load_state_dict(folder / PEFT_PICKLE).items()}
    raise DamagedError(f"{folder} lacks {PEFT_WEIGHTS}")


def _linear_layers(
    specs: Sequence[ParamSpec], pieces: Mapping[str, Sequence[Piece]]
) -> dict[str, tuple[ParamSpec, Piece]]:
    """The modules that can have adapters, and the parameter that each holds."""
    return {
        piece.name.removesuffix(".weight"): (spec, piece)
        for spec in specs
        if spec.lora is not None
        for piece in pieces[spec.path]
        if is_linear(piece)
    }


def _magnitudes(
    folder: Path,
    modules: Mapping[str, _Module],
    linear: Mapping[str, tuple[ParamSpec, Piece]],
) -> dict[str, np.ndarray]:
    """DoRA's magnitudes, by our names."""
    found: dict[str, np.ndarray] = {}
    problems = []
    for name, (spec, piece) in linear.items():
        module = modules.get(name)
        shape = (*spec.shape[:-2], spec.shape[-1])
        path = f"{spec.path}.{MAGNITUDE}"
        if module is None or module.magnitude is None or module.magnitude.shape != shape[-1:]:
            if module is not None:
                problems.append(f"{name} has no {_DORA} of shape {shape[-1:]}")
            continue
        part = ... if piece.part is None else piece.part
        found.setdefault(path, np.full(shape, np.nan, np.float32))[part] = module.magnitude
    problems += [
        f"{path.removesuffix('.' + MAGNITUDE)} has DoRA in only one of its two halves"
        for path, array in found.items()
        if array.ndim > 1 and np.isnan(array).all(-1).any()
    ]
    if problems:
        raise MismatchError(f"{folder}: DoRA's magnitudes do not fit", problems)
    return found
