"""Small checkpoints of every format."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from cases import make_config, make_params

from recurrentgemma.common.io.arrays import DTYPES
from recurrentgemma.common.io.checkpoint import BUNDLED, load_tokenizer
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.vocabulary import SENTENCEPIECE
from recurrentgemma_conversion.convert import WRITERS
from recurrentgemma_conversion.formats import Format
from recurrentgemma_conversion.names import layout
from recurrentgemma_conversion.readers.base import Contents

# The vocabulary of the bundled tokenizer.
CONFIGS = {
    "griffin": make_config("RRARR", vocab_size=2048),
    "attention_last": make_config(
        "RA", vocab_size=2048, width=40, lru_width=24, attention_window_size=5, logits_soft_cap=0.0
    ),
    "recurrent": make_config(
        "RR", vocab_size=2048, num_heads=3, lru_width=36, embeddings_scale_by_sqrt_dim=False
    ),
}


def parameters(config: GriffinConfig, dtype: str) -> dict[str, np.ndarray]:
    """Values of every parameter, by path, in the Flax layout."""
    return {path: value.astype(DTYPES[dtype]) for path, value in make_params(config).items()}


def write_checkpoint(
    folder: Path,
    format_: Format,
    config: GriffinConfig = CONFIGS["griffin"],
    dtype: str = "float32",
    changes: Mapping[str, np.ndarray] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Path:
    """Makes a checkpoint; `changes` are parameters with other values, `dtypes` those of others."""
    folder.mkdir(parents=True)
    params = parameters(config, dtype) | dict(changes or {})
    names = {spec.path: dtype for spec in layer_spec(config)} | dict(dtypes or {})
    stored = {path: DTYPES[name] for path, name in names.items()}
    contents = Contents(config, stored, "model", tokenizer=load_tokenizer())
    with WRITERS[format_](folder, contents) as write:
        for name, tensor in layout(config, format_).encode(lambda spec: params[spec.path]):
            write(name, tensor)
    (folder / SENTENCEPIECE).write_bytes((BUNDLED / SENTENCEPIECE).read_bytes())
    return folder


def decoded(
    config: GriffinConfig, format_: Format, stored: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The parameters, by path, that a file of a format holds, and no other tensors."""
    names = layout(config, format_)
    assert stored.keys() == names.shapes.keys()
    return {spec.path: np.asarray(names.decode(spec, stored.__getitem__)) for spec in names.specs}


def files(folder: Path) -> dict[str, bytes]:
    """The content of a folder."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def write_orbax(path: Path, *, ocdbt: bool, wrapped: bool = False) -> Path:
    """A directory that Orbax itself wrote, compressed."""
    import orbax.checkpoint as ocp

    source = write_checkpoint(path.with_name(path.name + "-raw"), Format.KAGGLE_FLAX)
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(source / "model")
    shutil.rmtree(source)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)) as checkpointer:
        checkpointer.save(path / "model", {"params": tree} if wrapped else tree)
    return path
