"""The calls that published tutorials and examples make, as they are written there."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

from recurrentgemma.common.io.checkpoint import BUNDLED
from recurrentgemma.common.model.gemma import GemmaConfig
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.presets import Preset, TemporalBlockType

# Not the packages themselves: under pytest tests/jax and tests/torch would do for them.
SUBMODULES = {"jax": "jax.numpy", "torch": "torch.nn"}
PROMPTS = ["In the beginning", ""]
NAMES = [
    "AttentionBlockCache",
    "BlockDiagonalLinear",
    "Conv1D",
    "Griffin",
    "GriffinConfig",
    "LocalAttentionBlock",
    "Preset",
    "RGLRU",
    "RecurrentBlock",
    "RecurrentBlockCache",
    "ResidualBlock",
    "ResidualBlockCache",
    "Sampler",
    "ScanType",
    "TemporalBlockType",
    "linear_scan",
]


@pytest.fixture(scope="module")
def vocab() -> spm.SentencePieceProcessor:
    vocab = spm.SentencePieceProcessor()
    vocab.Load(str(BUNDLED / "tokenizer.model"))
    return vocab


@pytest.fixture(scope="module")
def config() -> GriffinConfig:
    recurrent, attention = TemporalBlockType.RECURRENT, TemporalBlockType.ATTENTION
    return GriffinConfig(
        vocab_size=2048,
        width=32,
        mlp_expanded_width=48,
        num_heads=2,
        block_types=(recurrent, attention),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=8,
        logits_soft_cap=30.0,
    )


def check_output(out, *, echo: bool, return_logits: bool) -> None:
    assert len(out.text) == len(out.tokens) == len(PROMPTS)
    assert bool(len(out.logits)) == return_logits
    if return_logits:
        assert [len(rows) for rows in out.logits] == [len(row) for row in out.tokens]
        assert all(np.isfinite(np.asarray(rows)).all() for rows in out.logits)
    assert out.text[0].startswith("In the beginning") == echo


def test_jax(config: GriffinConfig, vocab: spm.SentencePieceProcessor, tmp_path: Path) -> None:
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    import jax
    import optax

    from recurrentgemma import jax as recurrentgemma

    tokens = np.array([[2, 10, 11, 12]])
    segment_pos = np.arange(4)[None]
    model = recurrentgemma.Griffin(config)
    variables = model.init(jax.random.key(0), tokens, segment_pos)
    recurrentgemma.save_parameters(str(tmp_path / "checkpoint"), variables)

    params = recurrentgemma.load_parameters(str(tmp_path / "checkpoint"), "single_device")
    preset = recurrentgemma.Preset.RECURRENT_GEMMA_2B_V1
    loaded = recurrentgemma.GriffinConfig.from_flax_params_or_variables(params, preset=preset)
    assert loaded.num_heads == 2
    assert loaded.attention_window_size == 2048

    logits, cache = model.apply(
        {"params": params}, tokens=tokens, segment_pos=segment_pos, cache=None
    )
    assert logits.shape == (1, 4, 2048)
    assert set(cache) == {"blocks.0", "blocks.1"}

    sampler = recurrentgemma.Sampler(model=model, vocab=vocab, params=params, is_it_model=False)
    out = sampler(input_strings=PROMPTS, total_generation_steps=3)
    check_output(out, echo=False, return_logits=False)
    key = jax.random.key(1)
    out = sampler(
        input_strings=PROMPTS,
        total_generation_steps=3,
        rng=key,
        echo=True,
        return_logits=True,
        end_sampling_at_eos_token=False,
    )
    check_output(out, echo=True, return_logits=True)
    jax.random.uniform(key)  # the caller's key is still usable

    # The tutorial's training step, its arguments static and donated as there.
    def loss_fn(params, model, example):
        logits, _ = model.apply(
            {"params": params},
            tokens=example[:, :-1],
            segment_pos=np.arange(3)[None],
            cache=None,
        )
        one_hot = jax.nn.one_hot(example[:, 1:], logits.shape[-1])
        return -(jax.nn.log_softmax(logits) * one_hot).sum()

    def train_step(model, params, optimizer, opt_state, example):
        loss, grads = jax.value_and_grad(loss_fn)(params, model=model, example=example)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return loss, optax.apply_updates(params, updates), opt_state

    train_step = jax.jit(
        train_step,
        static_argnames=["model", "optimizer"],
        donate_argnames=["params", "opt_state"],
    )
    optimizer = optax.sgd(1e-2)
    opt_state = jax.jit(optimizer.init)(params)
    loss, params, opt_state = train_step(model, params, optimizer, opt_state, tokens)
    later, params, _ = train_step(model, params, optimizer, opt_state, tokens)
    assert later < loss
    sampler.params = params
    check_output(
        sampler(input_strings=PROMPTS, total_generation_steps=1), echo=False, return_logits=False
    )
    with pytest.raises(ValueError, match=r"missing final_norm\.scale"):
        sampler.params = {k: v for k, v in params.items() if k != "final_norm"}


def test_torch(config: GriffinConfig, vocab: spm.SentencePieceProcessor, tmp_path: Path) -> None:
    pytest.importorskip("torch.nn", reason="torch is not installed")
    import torch

    from recurrentgemma import torch as recurrentgemma

    torch.save(
        recurrentgemma.Griffin(config, dtype=torch.bfloat16).state_dict(), tmp_path / "model.pt"
    )
    state_dict = torch.load(tmp_path / "model.pt", weights_only=True)
    preset = recurrentgemma.Preset.RECURRENT_GEMMA_2B_V1
    loaded = recurrentgemma.GriffinConfig.from_torch_params(state_dict, preset=preset)
    assert loaded.num_heads == 2
    assert loaded.attention_window_size == 2048

    model = recurrentgemma.Griffin(config, device="cpu", dtype=torch.bfloat16)
    model.load_state_dict(state_dict)
    tokens, segment_pos = torch.tensor([[2, 10, 11, 12]]), torch.arange(4)[None]
    logits, cache = model(tokens=tokens, segment_pos=segment_pos, cache=None)
    assert logits.shape == (1, 4, 2048)
    assert logits.dtype == torch.float32
    assert set(cache) == {"blocks.0", "blocks.1"}

    sampler = recurrentgemma.Sampler(model=model, vocab=vocab, is_it_model=False)
    out = sampler(input_strings=PROMPTS, total_generation_steps=3)
    check_output(out, echo=False, return_logits=False)
    out = sampler(
        input_strings=PROMPTS,
        total_generation_steps=3,
        echo=True,
        return_logits=True,
        end_sampling_at_eos_token=False,
    )
    check_output(out, echo=True, return_logits=True)


@pytest.mark.parametrize("twin", ["jax", "torch"])
def test_simple_run(twin: str, config: GriffinConfig) -> None:
    """Prefill, then a decode loop by hand."""
    pytest.importorskip(SUBMODULES[twin], reason=f"{twin} is not installed")
    module = __import__(f"recurrentgemma.{twin}", fromlist=["Griffin"])
    if twin == "jax":
        import jax

        params = module.init_params(config, seed=0)
        model = module.Griffin(config)

        @jax.jit
        def run(tokens, segment_pos, cache):
            return model.apply(
                {"params": params}, tokens=tokens, segment_pos=segment_pos, cache=cache
            )
    else:
        run = module.Griffin(config)
    prompt = np.array([[2, 5, 6, 7, 8, 9]])
    _, cache = run(prompt, np.arange(6)[None], None)
    generated = []
    token = prompt[:, -1:]
    for step in range(10):
        logits, cache = run(token, np.array([[6 + step]]), cache)
        if twin == "torch":
            logits = logits.detach().numpy()
        token = np.asarray(logits[:, -1].argmax(-1))[:, None]
        generated.append(int(token[0, 0]))
    assert all(0 <= token < 2048 for token in generated)


@pytest.mark.parametrize("twin", ["jax", "torch"])
def test_published_names(twin: str) -> None:
    pytest.importorskip(SUBMODULES[twin], reason=f"{twin} is not installed")
    module = __import__(f"recurrentgemma.{twin}", fromlist=["Griffin"])
    names = NAMES + (["ShardingSpec", "load_parameters"] if twin == "jax" else [])
    assert [name for name in names if not hasattr(module, name)] == []
    assert set(names) <= set(module.__all__)


@pytest.mark.parametrize("twin", ["jax", "torch"])
def test_the_model_of_any_config(twin: str, config: GriffinConfig) -> None:
    """`Griffin` is the published name of `Model`, which says what config it has."""
    pytest.importorskip(SUBMODULES[twin], reason=f"{twin} is not installed")
    module = __import__(f"recurrentgemma.{twin}", fromlist=["Griffin"])
    assert module.Griffin is module.Model is module.griffin.Griffin
    gemma = GemmaConfig.from_sizes(3, 64, 32, 48, 2, 4, 2, 8, sliding_window=6)
    for given, name in ((config, "GriffinConfig"), (gemma, "GemmaConfig")):
        model = module.Model(given, **({"device": "meta"} if twin == "torch" else {}))
        assert repr(model).startswith(f"Model({name}(")
        assert repr(model).endswith(" parameters)")


def test_presets() -> None:
    signature = inspect.signature(GriffinConfig.from_preset)
    assert list(signature.parameters) == ["preset", "vocab_size", "max_sequence_length"]
    config = GriffinConfig.from_preset(Preset.RECURRENT_GEMMA_2B_V1, max_sequence_length=512)
    assert (config.vocab_size, config.attention_window_size) == (256_000, 512)
    assert json.loads(config.to_json())["num_heads"] == 10
