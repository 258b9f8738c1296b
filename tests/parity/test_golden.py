"""Against what the published implementations computed: `../shared/golden`, where it is there."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
from cases import bfloat16, next_token_loss
from checkpoints import decoded
from safetensors.numpy import load_file
from sweeps import fewer_in_jax, sweep

from backends import BACKENDS, Backend
from recurrentgemma.common.model import reference
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.state_dict import to_torch, torch_name
from recurrentgemma_conversion import Format
from tolerances import assert_close

GOLDEN = Path(__file__).parents[2] / "../shared/golden"
CASES = ("prompt", "packed", "short")
LAYOUTS = [
    "flax/tiny",
    "flax/tiny-bf16",
    "flax_zarr/tiny",
    "flax_save_parameters/tiny",
    "flax_orbax059_ocdbt/tiny",
    "flax_orbax059_ocdbt/tiny-bf16",
    "flax_orbax059_zarr/tiny",
    "flax_orbax059_zarr/tiny-bf16",
]

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the golden data is not at ../shared/golden"
)


@functools.cache
def golden_config() -> GriffinConfig:
    return GriffinConfig.from_json((GOLDEN / "outputs/tiny.config.json").read_text())


@functools.cache
def golden_params(name: str = "tiny") -> dict[str, np.ndarray]:
    """The weights in float64, from the Hugging Face file through its table of names."""
    stored = load_file(GOLDEN / "hf/tiny/model.safetensors")
    params = decoded(golden_config(), Format.HUGGINGFACE, stored)
    wide = {path: value.astype(np.float64) for path, value in params.items()}
    return {p: bfloat16(v) for p, v in wide.items()} if name == "tiny-bf16" else wide


@functools.cache
def golden(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"outputs/{case}.npz") as outputs:
        return dict(outputs)


@functools.cache
def run(backend: Backend, case: str, dtype: str = "float32", name: str = "tiny") -> Any:
    """Logits and state after a prefill, then after the teacher-forced decoding, token by token."""
    want = golden(f"tiny.{case}")
    model = backend.griffin(golden_config(), golden_params(name), dtype)
    logits, state = model(want["tokens"], want["segment_pos"])
    decoded, later = [], state
    for t in range(want["decode_tokens"].shape[1]):
        step = slice(t, t + 1)
        out, later = model(want["decode_tokens"][:, step], want["decode_pos"][:, step], later)
        decoded.append(out)
    return logits, state, np.concatenate(decoded, 1), later


@pytest.mark.parametrize("name", ["tiny", "tiny-bf16"])
def test_the_state_dict(name: str) -> None:
    """The published PyTorch file holds the same numbers, and a model takes it as it is."""
    pytest.importorskip("torch.nn", reason="torch is not installed")
    import torch

    from recurrentgemma.torch import Griffin, GriffinConfig

    stored = torch.load(GOLDEN / f"pytorch/{name}.pt", weights_only=True)
    config = GriffinConfig.from_torch_params(
        stored,
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=16,
        logits_soft_cap=30.0,
    )
    assert config == golden_config()
    dtype = torch.float32 if name == "tiny" else torch.bfloat16
    assert {value.dtype for value in stored.values()} == {dtype}
    Griffin(config, dtype=dtype).load_state_dict(stored)
    assert len(stored) == len(golden_params(name))
    for spec in layer_spec(config):
        value = to_torch(spec.path, stored[torch_name(spec.path)].double().numpy())
        np.testing.assert_array_equal(value, golden_params(name)[spec.path], err_msg=spec.path)


@pytest.mark.parametrize("case", CASES)
def test_logits(backend: Backend, case: str) -> None:
    want = golden(f"tiny.{case}")
    logits, _, decoded, _ = run(backend, case)
    real = want["segment_pos"] >= 0
    assert_close(logits[real], want["logits"][real], "logits", "golden")
    assert_close(decoded, want["decode_logits"], "logits", "golden")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("when", ["cache", "cache_after_decode"])
def test_state(backend: Backend, case: str, when: str) -> None:
    config, want = golden_config(), golden(f"tiny.{case}")
    _, prefilled, _, decoded = run(backend, case)
    state = prefilled if when == "cache" else decoded
    names = {f"{when}/{block}/{field}" for block, fields in state.items() for field in fields}
    assert names == {name for name in want if name.startswith(f"{when}/")}
    for block, fields in state.items():
        published = {field: want[f"{when}/{block}/{field}"] for field in fields}
        if "keys" not in fields:
            assert_close(fields, published, "state", "golden", name=block)
            continue
        np.testing.assert_array_equal(fields["num_tokens"], published["num_tokens"])
        window = config.attention_window_size
        for row, seen in enumerate(fields["num_tokens"]):
            # The published ring orders its slots differently, and may keep an older document's.
            kept = np.arange(max(0, seen - window), seen) % window
            key, value = fields["keys"][row, kept, 0], fields["values"][row, kept, 0]
            apart = np.abs(key[:, None] - published["keys"][row, :, 0]).max(-1)
            slot = apart.argmin(-1)
            assert len(set(slot)) == len(kept) > 0
            assert_close(key, published["keys"][row, slot, 0], "state", "golden")
            assert_close(value, published["values"][row, slot, 0], "state", "golden")


GRADIENTS = [("packed", True), ("short", False), ("prompt", True), ("short", True)]


@pytest.mark.parametrize(
    ("backend", "asked"), fewer_in_jax(GRADIENTS, GRADIENTS[:2]), indirect=["backend"]
)
def test_loss_and_every_gradient(backend: Backend, asked: tuple[str, bool]) -> None:
    case, checkpointing = asked
    want = golden(f"tiny.{case}")
    logits, state, _, _ = run(backend, case)
    loss, dlogits = next_token_loss(logits, want["tokens"], want["loss_mask"])
    np.testing.assert_allclose(loss, want["loss"], rtol=0, atol=1e-5)
    model = backend.griffin(golden_config(), golden_params(), "float32", checkpointing)
    nothing = {
        block: {f: np.zeros_like(leaf) for f, leaf in fields.items()}
        for block, fields in state.items()
    }
    given = model.grads(want["tokens"], want["segment_pos"], dy=dlogits, dstate=nothing)
    published = {
        spec.path: want["grad/" + spec.path.replace(".", "/").replace("blocks/", "blocks.")]
        for spec in layer_spec(golden_config())
    }
    assert len(published) == sum(name.startswith("grad/") for name in want)
    published = {path: published[path] for path in sorted(published)}
    assert_close(given["params"], published, "gradient", "golden")


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_errs_no_more_than_the_published_halves(backend: Backend, case: str) -> None:
    """Against float64 on the same rounded weights: the largest error and the root mean square."""
    stored, weights = golden(f"tiny-bf16.{case}"), golden_params("tiny-bf16")
    tokens, segment_pos = stored["jax/tokens"], stored["jax/segment_pos"]
    truth, state = reference.forward(golden_config(), weights, tokens, segment_pos)
    decode = stored["jax/decode_tokens"], stored["jax/decode_pos"]
    decoded_truth, _ = reference.forward(golden_config(), weights, *decode, state)
    logits, _, decoded, _ = run(backend, case, "bfloat16", "tiny-bf16")
    real = segment_pos >= 0

    def errors(logits: np.ndarray, decoded: np.ndarray) -> tuple[float, float]:
        prefill, later = logits[real] - truth[real], decoded - decoded_truth
        all_errors = np.concatenate([prefill.ravel(), later.ravel()])
        return float(np.abs(all_errors).max()), float(np.sqrt((all_errors**2).mean()))

    ours = errors(logits, decoded)
    theirs = errors(stored[f"{backend.name}/logits"], stored[f"{backend.name}/decode_logits"])
    assert ours[1] <= theirs[1], f"root mean square {ours[1]}, published {theirs[1]}"
    assert ours[0] <= theirs[0], f"largest {ours[0]}, published {theirs[0]}"


def test_sampler(backend: Backend) -> None:
    """Greedy continuations of a batch, EOS not stopping; then of single prompts."""
    want = golden("tiny.sampler")
    vocab = spm.SentencePieceProcessor()
    vocab.Load(str(GOLDEN / "tokenizer.model"))
    sampler = backend.sampler(golden_config(), golden_params(), vocab)
    prompts = [str(prompt) for prompt in want["prompts"]]
    kwargs: dict[str, Any] = {"return_logits": True, "end_sampling_at_eos_token": False}
    together = sampler(prompts, 12, **kwargs)
    for i, prompt in enumerate(prompts):
        assert sampler.tokenizer.encode(prompt) == want[f"prompt_ids_{i}"].tolist()
        outputs = [(together, i)]
        if i % sweep(3, 1) == 0:
            outputs.append((sampler([prompt], 12, **kwargs), 0))
        for out, row in outputs:
            assert [int(token) for token in out.tokens[row]] == want[f"tokens_{i}"].tolist()
            logits = np.asarray(out.logits[row])
            assert_close(logits, want[f"logits_{i}"], "logits", "golden")
            expected_text = vocab.Decode(want[f"tokens_{i}"].tolist())
            assert out.text[row] == expected_text


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_every_orbax_layout_loads(
    layout: str, relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    import jax

    from recurrentgemma.jax import GriffinConfig, load_parameters

    path: str | Path = GOLDEN.resolve() / layout
    if relative:
        monkeypatch.chdir(GOLDEN)
        path = layout
    params = load_parameters(path)
    config = GriffinConfig.from_flax_params_or_variables(
        params,
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=16,
        logits_soft_cap=30.0,
    )
    assert config == golden_config()
    dtype = "bfloat16" if layout.endswith("bf16") else "float32"
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}
    actual = BACKENDS["jax"].to_numpy(params)
    expected = golden_params(layout.split("/")[1])
    for spec in layer_spec(config):
        leaf = actual
        keys = spec.path.split(".")
        keys = [".".join(keys[:2]), *keys[2:]] if keys[0] == "blocks" else keys
        for key in keys:
            leaf = leaf[key]
        np.testing.assert_array_equal(leaf, expected[spec.path], err_msg=spec.path)
    assert len(jax.tree.leaves(params)) == len(expected)


def test_shardings(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    import jax

    from recurrentgemma.jax import load_parameters

    path = GOLDEN.resolve() / LAYOUTS[0]
    single = load_parameters(path, "single_device")
    replicated = load_parameters(str(path), "replicated")
    tree = jax.tree.map(lambda leaf: leaf.sharding, replicated)
    chosen = load_parameters(path, tree)
    for one, two, three in zip(*map(jax.tree.leaves, (single, replicated, chosen)), strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
        assert three.sharding == two.sharding
    with pytest.raises(ValueError, match="structure"):
        load_parameters(path, {"embedder": tree["embedder"]})
    with pytest.raises(ValueError, match="got 'anywhere'"):
        load_parameters(path, "anywhere")
