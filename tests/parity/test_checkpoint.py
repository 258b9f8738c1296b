"""Checkpoint folders: either twin reads what the other wrote, and names what is wrong."""

import functools
import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from recurrentgemma.common.errors import MismatchError, TokenizerError
from recurrentgemma.common.io.arrays import DTYPES
from recurrentgemma.common.io.checkpoint import BUNDLED, load_tokenizer
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.state_dict import to_torch, torch_name
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma_conversion.readers.native import NativeReader

SUBMODULES = {"jax": "jax.numpy", "torch": "torch.nn"}
TOKENS, SEGMENT_POS = np.array([[2, 30, 31, 32, 33]]), np.arange(5)[None]
CONFIG = GriffinConfig(
    vocab_size=2048,
    width=24,
    mlp_expanded_width=40,
    num_heads=2,
    lru_width=32,
    block_types=("recurrent", "attention"),  # pyright: ignore[reportArgumentType]
    embeddings_scale_by_sqrt_dim=True,
    attention_window_size=4,
    logits_soft_cap=30.0,
)


@pytest.fixture(params=["jax", "torch"])
def twin(request) -> str:
    pytest.importorskip(SUBMODULES[request.param], reason=f"{request.param} is not installed")
    return request.param


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(BUNDLED / "tokenizer.model")


@pytest.fixture
def large() -> Tokenizer:
    """A tokenizer with more pieces than the model has rows."""
    pieces = ["<bos>", "<eos>", *map(str, range(2047))]
    return Tokenizer(
        tokenizers.Tokenizer(
            tokenizers.models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "0")
        )
    )


def save(twin: str, path: Path, tokenizer: Any, dtype: str = "float32", **kwargs) -> None:
    module = importlib.import_module(f"recurrentgemma.{twin}")
    if twin == "jax":
        params = module.init_params(CONFIG, 5, dtype)
        module.save_checkpoint(path, CONFIG, {"params": params}, tokenizer, **kwargs)
    else:
        import torch

        model = module.Griffin(CONFIG, dtype=getattr(torch, dtype))
        model.reset_parameters(seed=5)
        module.save_checkpoint(path, model, tokenizer, **kwargs)


def test_any_tokenizer_is_saved(twin: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """All that a sampler takes: a path, a processor, a tokenizer of `tokenizers`."""
    pieces = {piece: i for i, piece in enumerate(["<bos>", "<eos>", *map(str, range(2046))])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, "0"))
    for number, given in enumerate((str(BUNDLED), tokenizer.vocab, words)):
        save(twin, tmp_path / str(number), given)
        saved = load_tokenizer(tmp_path / str(number))
        assert saved.encode("7") == Tokenizer(given).encode("7")


@functools.cache
def _compiled(model: Any) -> Any:
    import jax

    return jax.jit(model.apply)


def load(
    twin: str, path: Path, dtype: str | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Parameters in the Flax layout, float32, and the logits."""
    module = importlib.import_module(f"recurrentgemma.{twin}")
    if twin == "jax":
        import jax.numpy as jnp

        from recurrentgemma.jax.runtime.trees import get_path

        model, params = module.load_checkpoint(path, dtype=dtype)
        logits, _ = _compiled(model)({"params": params}, TOKENS, SEGMENT_POS)
        values = {s.path: get_path(params, s.path) for s in layer_spec(model.config)}
        return {p: np.asarray(v.astype(jnp.float32)) for p, v in values.items()}, np.asarray(logits)
    import torch

    model = module.load_checkpoint(path, dtype=getattr(torch, dtype) if dtype else None)
    state = model.state_dict()
    values = {
        spec.path: to_torch(spec.path, state[torch_name(spec.path)].float().numpy())
        for spec in layer_spec(model.config)
    }
    return values, model(TOKENS, SEGMENT_POS)[0].detach().numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("writer", "reader"), [("jax", "torch"), ("torch", "jax")])
def test_each_twin_reads_what_the_other_wrote(
    tmp_path: Path, tokenizer: Tokenizer, writer: str, reader: str, dtype: str
) -> None:
    for submodule in SUBMODULES.values():
        pytest.importorskip(submodule, reason="parity needs both frameworks")
    save(writer, tmp_path / "model", tokenizer, dtype)
    assert set(NativeReader(tmp_path / "model").dtypes.values()) == {DTYPES[dtype]}
    written, _ = load(writer, tmp_path / "model")
    read, _ = load(reader, tmp_path / "model")
    assert written.keys() == read.keys()
    for path, value in written.items():
        np.testing.assert_array_equal(value, read[path], err_msg=path)
    logits = [load(name, tmp_path / "model", "float32")[1] for name in (writer, reader)]
    np.testing.assert_allclose(logits[0], logits[1], atol=5e-5)


def test_folders_hold_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for twin, submodule in SUBMODULES.items():
        pytest.importorskip(submodule, reason="parity needs both frameworks")
        save(twin, tmp_path / twin, tokenizer)
    names = sorted(file.name for file in (tmp_path / "jax").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.model"]
    assert (tmp_path / "jax/config.json").read_bytes() == (
        tmp_path / "torch/config.json"
    ).read_bytes()
    assert NativeReader(tmp_path / "jax").config == CONFIG


def test_nothing_existing_is_replaced_unless_asked(
    twin: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "precious").touch()
    with pytest.raises(ValueError, match="exists; pass force=True"):
        save(twin, folder, tokenizer)
    assert [file.name for file in folder.iterdir()] == ["precious"]
    save(twin, folder, tokenizer, force=True)
    assert NativeReader(folder).config == CONFIG
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def changed(twin: str, changes: dict[str, np.ndarray | None]) -> tuple[Any, ...]:
    """What `save_checkpoint` takes of a model some of whose parameters are others, or gone."""
    module = importlib.import_module(f"recurrentgemma.{twin}")
    if twin == "jax":
        import jax

        from recurrentgemma.jax.runtime.trees import get_path, set_path

        params = jax.tree.map(lambda leaf: leaf, module.init_params(CONFIG, 5))
        for path, value in changes.items():
            if value is None:
                parent, leaf = path.rsplit(".", 1)
                del get_path(params, parent)[leaf]
            else:
                set_path(params, path, jax.numpy.asarray(value))
        return CONFIG, params
    import torch

    model = module.Griffin(CONFIG)
    for path, value in changes.items():
        parent, _, leaf = path.rpartition(".")
        if value is None:
            delattr(model.get_submodule(parent), leaf)
        else:
            tensor = torch.nn.Parameter(torch.from_numpy(value), requires_grad=False)
            setattr(model.get_submodule(parent), leaf, tensor)
    return (model,)


def test_parameters_that_are_not_the_configs_are_not_written(
    twin: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """All that is wrong is named at once, whether there is a folder already or not."""
    save_checkpoint = importlib.import_module(f"recurrentgemma.{twin}").save_checkpoint
    changes = {
        "blocks.0.recurrent_block.conv_1d.w": np.zeros((3, 32), np.float32),
        "blocks.0.recurrent_block.conv_1d.b": None,
        "blocks.1.channel_pre_norm.scale": np.zeros(24, np.int32),
        "blocks.1.extra": np.zeros(2, np.float32),
    }
    save(twin, tmp_path / "model", tokenizer)
    before = (tmp_path / "model/model.safetensors").read_bytes()
    for name in ("model", "new"):
        with pytest.raises(MismatchError, match=r"\(4 differences\)") as caught:
            save_checkpoint(tmp_path / name, *changed(twin, changes), tokenizer, force=True)
        for problem in (
            "blocks.0.recurrent_block.conv_1d.w must have shape (4, 32), got (3, 32)",
            "missing blocks.0.recurrent_block.conv_1d.b (32,)",
            "blocks.1.channel_pre_norm.scale must be of a dtype among bfloat16, float16",
            "unexpected blocks.1.extra (2,)",
        ):
            assert problem in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model/model.safetensors").read_bytes() == before


def test_another_models_tokenizer_is_not_written(
    twin: str, tmp_path: Path, large: Tokenizer
) -> None:
    with pytest.raises(
        TokenizerError, match=f"has {large.size} pieces, and the vocabulary 2048 entries"
    ):
        save(twin, tmp_path / "model", large)
    assert not (tmp_path / "model").exists()


def test_an_interrupted_write_leaves_what_was_there(
    twin: str, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    save(twin, folder, tokenizer)
    before = (folder / "model.safetensors").read_bytes()

    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(twin, folder, tokenizer, "bfloat16", force=True)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_bad_folders(twin: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    load_checkpoint = importlib.import_module(f"recurrentgemma.{twin}").load_checkpoint
    with pytest.raises(ValueError, match="no checkpoint folder at"):
        load_checkpoint(tmp_path / "absent")
    good = tmp_path / "good"
    save(twin, good, tokenizer)

    def broken(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    folder = broken("lacking")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"lacks config\.json: put it there, or give"):
        load_checkpoint(folder)
    folder = broken("truncated")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is no complete safetensors file"):
        load_checkpoint(folder)
    folder = broken("other-config")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"width": 24', '"width": 32'))
    with pytest.raises(ValueError, match=r"\(\d+ differences\)") as caught:
        load_checkpoint(folder)
    assert "embedder.input_embedding must have shape (2048, 32), got (2048, 24)" in str(
        caught.value
    )
    assert "final_norm.scale must have shape (32,), got (24,)" in str(caught.value)
    folder = broken("not-json")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: "):
        load_checkpoint(folder)
    (tmp_path / "text").write_text("not a tokenizer")
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        load_tokenizer(tmp_path / "text")


def test_weights_are_read_without_a_tokenizer(
    twin: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    module = importlib.import_module(f"recurrentgemma.{twin}")
    folder = tmp_path / "model"
    save(twin, folder, tokenizer)
    expected, _ = load(twin, folder)
    (folder / "tokenizer.model").unlink()
    values, _ = load(twin, folder)
    for path, value in expected.items():
        np.testing.assert_array_equal(values[path], value, err_msg=path)
    if twin == "jax":
        assert module.load_parameters(folder)["final_norm"]["scale"].shape == (CONFIG.width,)
    with pytest.raises(
        TokenizerError,
        match=r"no tokenizer\.model or .* beside .*: put the model's there",
    ):
        module.load_tokenizer(folder)
    with pytest.raises(
        TokenizerError,
        match=r"no tokenizer\.model or .* beside .*: put the model's there",
    ):
        NativeReader(folder).load_tokenizer()


def test_torch_names_every_mismatch() -> None:
    pytest.importorskip("torch.nn", reason="torch is not installed")
    from recurrentgemma.torch import Griffin

    state = Griffin(CONFIG).state_dict()
    state["extra"] = state.pop("final_norm.scale")
    with pytest.raises(ValueError, match=r"2 differences") as caught:
        Griffin(CONFIG).load_state_dict(state)
    assert "missing final_norm.scale (24,)" in str(caught.value)
    assert "unexpected extra (24,)" in str(caught.value)


def _interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_orbax_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    import jax

    from recurrentgemma import jax as recurrentgemma

    params = recurrentgemma.init_params(CONFIG, 0, "bfloat16")
    monkeypatch.chdir(tmp_path)
    recurrentgemma.save_parameters("relative", {"params": params})
    with pytest.raises(ValueError, match="exists; pass force=True"):
        recurrentgemma.save_parameters("relative", params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    for sharding in ("single_device", "replicated", shardings):
        loaded = recurrentgemma.load_parameters("relative", sharding)
        assert jax.tree.structure(loaded) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
    sampler = recurrentgemma.Sampler(
        recurrentgemma.Griffin(CONFIG),
        load_tokenizer(BUNDLED / "tokenizer.model"),
        {"params": loaded},
    )
    assert sampler.params is loaded
    recurrentgemma.save_parameters("relative", params, force=True)
    jax.tree.map(np.testing.assert_array_equal, recurrentgemma.load_parameters("relative"), params)
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.PyTreeCheckpointer.save", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            recurrentgemma.save_parameters("relative", params, force=True)
    jax.tree.map(np.testing.assert_array_equal, recurrentgemma.load_parameters("relative"), params)
    assert [file.name for file in tmp_path.iterdir()] == ["relative"]
    with pytest.raises(ValueError, match="no checkpoint directory at"):
        recurrentgemma.load_parameters("absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is no Orbax checkpoint"):
        recurrentgemma.load_parameters("empty")
    with pytest.raises(ValueError, match='must be "single_device", "replicated" or a tree'):
        recurrentgemma.load_parameters("relative", "everywhere")


def test_parameters_of_jax_go_where_other_arguments_are() -> None:
    """They are fixed to a device only where the user names one; `apply` says what it takes."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    from recurrentgemma.jax import load_checkpoint, load_parameters

    model, free = load_checkpoint()
    _, fixed = load_checkpoint(device=jax.devices()[0])
    for params, committed in ((free, False), (load_parameters(BUNDLED), False), (fixed, True)):
        assert all(leaf.committed == committed for leaf in jax.tree.leaves(params))
    with pytest.raises(ValueError, match=r'must be \{"params": params\}, got embedder, '):
        model.apply(free, TOKENS, SEGMENT_POS)
