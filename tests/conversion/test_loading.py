"""Both twins load every format, and write ours."""

import functools
import importlib
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from cases import make_tokens
from checkpoints import CONFIGS, parameters

from recurrentgemma.common.errors import ConfigError
from recurrentgemma.common.io.checkpoint import load_tokenizer
from recurrentgemma.common.model import reference
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.state_dict import to_torch, torch_name
from recurrentgemma_conversion import Format, Overrides, convert, open_checkpoint
from recurrentgemma_conversion.convert import WRITERS
from tolerances import assert_close

pytest.importorskip("jax.numpy", reason="jax is not installed")
pytest.importorskip("torch.nn", reason="torch is not installed")

import jax
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from recurrentgemma.jax.runtime.trees import get_path
from recurrentgemma.torch.runtime.arrays import to_array

CONFIG = CONFIGS["griffin"]
TOKENS = make_tokens(CONFIG, 1, 12)
POSITIONS = np.arange(12, dtype=np.int32)[None]
WIDE = ("scale", "conv_1d.w", "conv_1d.b", "a_param")  # what enters in float32, however stored


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, positions) -> jax.Array:
    """Compiled once for all models of one config and one set of dtypes."""
    return model.apply({"params": params}, tokens, positions)[0]


def load(twin: str, path: Path, **kwargs) -> np.ndarray:
    """The logits of the loaded model."""
    module = importlib.import_module(f"recurrentgemma.{twin}")
    if twin == "torch":
        with torch.no_grad():
            return module.load_checkpoint(path, **kwargs)(TOKENS, POSITIONS)[0].numpy()
    model, params = module.load_checkpoint(path, **kwargs)
    return np.asarray(logits_of(model, params, TOKENS, POSITIONS))


@pytest.mark.parametrize("twin", ["jax", "torch"])
@pytest.mark.parametrize("format_", WRITERS)
def test_any_format_loads(make, twin: str, format_: Format) -> None:
    expected, _ = reference.forward(CONFIG, parameters(CONFIG, "float32"), TOKENS, POSITIONS)
    assert_close(load(twin, make("model", format_)), expected, "logits", "float32")


@pytest.mark.parametrize("twin", ["jax", "torch"])
def test_archives_and_folders_around_load(tmp_path: Path, make, twin: str) -> None:
    folder = make("outer/inner", Format.KAGGLE_FLAX)
    expected = load(twin, folder)
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as archive:
        archive.add(folder, ".")
    for path in (tmp_path / "archive.tar.gz", tmp_path / "outer", folder / "model"):
        np.testing.assert_array_equal(load(twin, path), expected)


def test_what_the_shapes_do_not_tell_can_be_given(make) -> None:
    folder = make("model", Format.KAGGLE_TORCH)
    expected = load("torch", folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="shapes do not tell embeddings_scale_by_sqrt_dim"):
        load("torch", folder)
    for twin in ("torch", "jax"):
        logits = load(twin, folder, overrides=Overrides(None, True, 8, 5.0))
        assert_close(logits, expected, "logits", "float32")


@pytest.mark.parametrize("format_", WRITERS)
def test_dtypes_of_torch(make, format_: Format) -> None:
    folder = make("model", format_, CONFIG, "bfloat16")
    load_checkpoint = importlib.import_module("recurrentgemma.torch").load_checkpoint
    for dtype in (None, torch.float32):
        model = load_checkpoint(folder, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype or torch.bfloat16}
        assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    assert {p.device.type for p in load_checkpoint(folder, device="meta").parameters()} == {"meta"}


def loaded(twin: str, path: Path, dtype: str | None = None) -> tuple[dict[str, np.ndarray], str]:
    """The parameters that are loaded, and the dtype that the model makes a cache in."""
    module = importlib.import_module(f"recurrentgemma.{twin}")
    if twin == "torch":
        model = module.load_checkpoint(path, dtype=dtype and getattr(torch, dtype))
        values = {name: to_array(tensor) for name, tensor in model.state_dict().items()}
        keys = model.init_cache(1)["blocks.2"].keys
        specs = layer_spec(CONFIG)
        values = {s.path: to_torch(s.path, values[torch_name(s.path)]) for s in specs}
        return values, str(keys.dtype).removeprefix("torch.")
    model, params = module.load_checkpoint(path, dtype=dtype)
    values = {s.path: np.asarray(get_path(params, s.path)) for s in layer_spec(CONFIG)}
    return values, str(model.init_cache(1)["blocks.2"].keys.dtype)


@pytest.mark.parametrize(
    ("dtype", "value"), [("bfloat16", 1 + 2**-8 + 2**-40), ("float16", 1 + 2**-11 + 2**-40)]
)
@pytest.mark.parametrize("twin", ["jax", "torch"])
def test_casts_round_once(tmp_path: Path, make, twin: str, dtype: str, value: float) -> None:
    """By way of float32 these would come to lie halfway, and then go to the even 1."""
    values = {"final_norm.scale": np.full(CONFIG.width, value)}
    source = make("wide", Format.RECURRENTGEMMA, CONFIG, "float64", values)
    params, _ = loaded(twin, source, dtype)
    convert(source, tmp_path / "narrow", Format.RECURRENTGEMMA, dtype=dtype)
    with open_checkpoint(tmp_path / "narrow") as reader:
        for spec, expected in reader:
            np.testing.assert_array_equal(params[spec.path], expected, err_msg=spec.path)
    assert np.all(params["final_norm.scale"].astype(np.float64) > value)


@pytest.mark.parametrize("twin", ["jax", "torch"])
def test_parameters_are_of_a_float(make, twin: str) -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of bfloat16, .*, got int8"):
        loaded(twin, make("model", Format.RECURRENTGEMMA), "int8")


@pytest.mark.parametrize("twin", ["jax", "torch"])
@pytest.mark.parametrize("dtype", [None, "float64"])
def test_the_model_is_of_the_dtype_of_what_it_loaded(make, twin: str, dtype: str | None) -> None:
    """As stored; but JAX has no float64 unless it is told so: whoever asks for it is told."""
    source = make("wide", Format.RECURRENTGEMMA, CONFIG, "float64")
    for x64 in (False, True):
        with jax.enable_x64(x64):
            if dtype is not None and twin == "jax" and not x64:
                with pytest.raises(ValueError, match="got float64, for which it would take float3"):
                    loaded(twin, source, dtype)
                continue
            params, cache = loaded(twin, source, dtype)
        expected = "float64" if x64 or twin == "torch" else "float32"
        assert {value.dtype.name for value in params.values()} == {expected}
        assert cache == expected


@pytest.mark.parametrize("twin", ["jax", "torch"])
@pytest.mark.parametrize(
    ("name", "dtype", "computation"),
    [
        ("embedder.input_embedding", "float16", "float32"),
        ("blocks.3.recurrent_block.linear_out.bias", "float32", "float32"),
        (WIDE, "float32", "bfloat16"),
    ],
)
def test_what_is_multiplied_is_of_one_dtype(
    make, twin: str, name: str | tuple[str, ...], dtype: str, computation: str
) -> None:
    """Where it is not stored so it is loaded as what holds all; nothing else is."""
    dtypes = {s.path: dtype for s in layer_spec(CONFIG) if s.path.endswith(name)}
    folder = make("model", Format.RECURRENTGEMMA, CONFIG, "bfloat16", dtypes=dtypes)
    params, cache = loaded(twin, folder)
    assert cache == computation
    found = {path: value.dtype.name for path, value in params.items()}
    if computation == "bfloat16":
        assert found == dict.fromkeys(params, "bfloat16") | dtypes
    else:
        assert {found[path] for path in params if not path.endswith(WIDE)} == {computation}
        assert {found[path] for path in params if path.endswith(WIDE)} == {"bfloat16"}
    values = {path: value.astype(np.float64) for path, value in params.items()}
    expected, _ = reference.forward(CONFIG, values, TOKENS, POSITIONS)
    assert_close(load(twin, folder), expected, "logits", computation)


def test_what_is_split_is_of_one_dtype(make) -> None:
    """FSDP takes no other."""
    dtypes = {"final_norm.scale": "float32"}
    folder = make("model", Format.RECURRENTGEMMA, CONFIG, "bfloat16", dtypes=dtypes)
    load_checkpoint = importlib.import_module("recurrentgemma.torch").load_checkpoint
    with pytest.raises(ValueError, match="of one dtype, got bfloat16, float32; pass dtype"):
        load_checkpoint(folder, mesh="a mesh")


def test_jax_models_are_of_no_dtype_that_is_turned_off() -> None:
    module, zeros = importlib.import_module("recurrentgemma.jax"), np.zeros((1, 1), np.int32)
    for use in (
        lambda: module.init_params(CONFIG, 0, "float64"),
        lambda: module.Griffin(CONFIG, param_dtype="float64").init(jax.random.key(0), zeros, zeros),
        lambda: module.Griffin(CONFIG, dtype="float64").apply({"params": {}}, zeros, zeros),
    ):
        with pytest.raises(ValueError, match="got float64, for which it would take float32: jax"):
            use()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torch_maps_the_file_and_leaves_it_alone(make) -> None:
    file = make("model", Format.RECURRENTGEMMA) / "model.safetensors"
    before = file.read_bytes()
    model = importlib.import_module("recurrentgemma.torch").load_checkpoint(file.parent)
    lines = Path("/proc/self/maps").read_text().splitlines()
    (span,) = (line.split()[0] for line in lines if line.endswith(str(file)))
    start, end = (int(part, 16) for part in span.split("-"))
    assert all(start <= p.data_ptr() < end for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert file.read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_jax_maps_the_file_where_no_axes_are_turned(make) -> None:
    file = make("model", Format.RECURRENTGEMMA) / "model.safetensors"
    _, params = importlib.import_module("recurrentgemma.jax").load_checkpoint(file.parent)
    lines = Path("/proc/self/maps").read_text().splitlines()
    (span,) = (line.split()[0] for line in lines if line.endswith(str(file)))
    start, end = (int(part, 16) for part in span.split("-"))
    embedding = params["embedder"]["input_embedding"]
    assert start <= embedding.unsafe_buffer_pointer() < end


@pytest.mark.parametrize("twin", ["jax", "torch"])
def test_replacing_a_checkpoint_leaves_what_was_loaded_from_it(make, twin: str) -> None:
    """Though it is a view of the file that was there."""
    folder = make("model", Format.RECURRENTGEMMA)
    module = importlib.import_module(f"recurrentgemma.{twin}")
    if twin == "torch":
        model, other = module.load_checkpoint(folder), module.Griffin(CONFIG)
        args, values = (other,), model.state_dict()
        params = {s.path: values[torch_name(s.path)] for s in layer_spec(CONFIG)}
    else:
        _, tree = module.load_checkpoint(folder)
        args = (CONFIG, module.init_params(CONFIG, 7))
        params = {s.path: get_path(tree, s.path) for s in layer_spec(CONFIG)}
    module.save_checkpoint(folder, *args, load_tokenizer(folder), force=True)
    expected = parameters(CONFIG, "float32")
    for spec in layer_spec(CONFIG):
        value = np.asarray(params[spec.path])
        value = value if twin == "jax" else to_torch(spec.path, value)
        np.testing.assert_array_equal(value, expected[spec.path], err_msg=spec.path)
    changed, _ = loaded(twin, folder)
    assert not np.array_equal(
        changed["embedder.input_embedding"], expected["embedder.input_embedding"]
    )


@pytest.mark.parametrize("format_", WRITERS)
def test_load_parameters_reads_any_format(make, format_: Format) -> None:
    folder = make("model", format_, CONFIG, "bfloat16")
    (folder / "config.json").unlink() if format_.startswith("kaggle") else None
    load_parameters = importlib.import_module("recurrentgemma.jax").load_parameters
    replicated = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec())
    expected = parameters(CONFIG, "bfloat16")
    tree = load_parameters(folder)
    shardings = jax.tree.map(lambda _: replicated, tree)
    for sharding in ("single_device", "replicated", replicated, shardings, {"params": shardings}):
        params = load_parameters(folder, sharding)
        for spec in layer_spec(CONFIG):
            value = get_path(params, spec.path)
            assert isinstance(value, jax.Array)
            single = isinstance(value.sharding, SingleDeviceSharding)
            assert single == (sharding == "single_device")
            np.testing.assert_array_equal(np.asarray(value), expected[spec.path])
    with pytest.raises(ValueError, match="must have the parameters' structure"):
        load_parameters(folder, {"a": replicated})


def test_devices_and_dtypes_of_jax(make) -> None:
    folder = make("model", Format.HUGGINGFACE, CONFIG, "bfloat16")
    load_checkpoint = importlib.import_module("recurrentgemma.jax").load_checkpoint
    (device, *_) = jax.devices()
    model, params = load_checkpoint(folder, dtype="float32", device=device)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert model.param_dtype == "float32"
    assert {leaf.device for leaf in jax.tree.leaves(params)} == {device}
    with pytest.raises(ValueError, match="either a device, a sharding or a mesh"):
        load_checkpoint(folder, device=device, sharding="replicated")


@pytest.mark.parametrize("twin", ["jax", "torch"])
@pytest.mark.parametrize("format_", WRITERS)
def test_what_a_twin_saves_is_what_it_loaded(
    tmp_path: Path, make, twin: str, format_: Format
) -> None:
    folder, out = make("model", format_, CONFIG, "bfloat16"), tmp_path / "out"
    module = importlib.import_module(f"recurrentgemma.{twin}")
    if twin == "torch":
        module.save_checkpoint(out, module.load_checkpoint(folder), load_tokenizer(folder))
    else:
        model, params = module.load_checkpoint(folder)
        module.save_checkpoint(out, model.config, params, load_tokenizer(folder))
    with open_checkpoint(out) as reader:
        assert (reader.format, reader.config) == (Format.RECURRENTGEMMA, CONFIG)
        for spec, value in reader:
            np.testing.assert_array_equal(value, parameters(CONFIG, "bfloat16")[spec.path])


def test_parameters_that_cannot_be_saved_leave_nothing(tmp_path: Path, monkeypatch) -> None:
    """Orbax writes beside the folder that it is given."""
    import orbax.checkpoint as ocp

    def fail(self, path: Path, *args, **kwargs) -> None:
        path.with_name(f"{path.name}.orbax-checkpoint-tmp").mkdir()
        raise OSError("the disk is gone")

    module = importlib.import_module("recurrentgemma.jax")
    monkeypatch.setattr(ocp.PyTreeCheckpointer, "save", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        module.save_parameters(tmp_path / "out", module.init_params(CONFIG, 0))
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    module.save_parameters(tmp_path / "out", module.init_params(CONFIG, 0))
    assert "it" not in {path.name for path in (tmp_path / "out").iterdir()}
    module.load_parameters(tmp_path / "out")
