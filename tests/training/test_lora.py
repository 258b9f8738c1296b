"""Adapters: in the forward pass, merged, on disk, and in PEFT."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import CONFIGS, make_config, make_params
from sweeps import sweep
from trainers import Trainer, make_batch

from recurrentgemma.common.errors import (
    CheckpointError,
    ConfigError,
    DamagedError,
    DestinationError,
    MismatchError,
    NonFiniteError,
    UnknownFormatError,
)
from recurrentgemma.common.model import reference
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.layer_spec import layer_spec, num_parameters
from recurrentgemma.common.model.presets import Preset
from recurrentgemma.common.model.state_dict import to_torch, torch_name
from recurrentgemma.common.quantization import Quantized
from recurrentgemma.common.training.adapters import (
    ADAPTERS,
    Adapters,
    read_adapters,
    write_adapters,
)
from recurrentgemma.common.training.lora import (
    LoraOptions,
    lora_targets,
    merge,
    num_trainable,
    trainable_specs,
)
from recurrentgemma.common.training.optimization import OptimizerOptions
from recurrentgemma_conversion.peft import write_peft
from tolerances import assert_close

CONFIG = CONFIGS["attention_last"]  # lru_width is not width
EVERY = ("attention", "recurrent", "mlp", "gates")
KINDS = {
    "every": LoraOptions(rank=3, alpha=6.0, targets=EVERY),
    "quantized": LoraOptions(rank=3, alpha=6.0, targets=EVERY, quantize=True),
    "mlp_quantized": LoraOptions(rank=2, alpha=1.0, targets=("mlp",), quantize=True),
}
OPTIMIZER = OptimizerOptions(learning_rate=3e-2, weight_decay=0.1)


def make_adapters(config: GriffinConfig, options: LoraOptions, seed: int = 0) -> Adapters:
    """Random adapters; B is random too."""
    rng = np.random.default_rng(seed)
    return Adapters(
        config,
        options,
        {
            spec.path: (rng.standard_normal(spec.shape) / 4).astype(np.float32)
            for spec in trainable_specs(config, options)
        },
    )


def with_adapters(trainer: Trainer, options: LoraOptions, dtype: str) -> Any:
    """A training state with the adapters of `make_adapters`."""
    state = trainer.state(
        CONFIG, make_params(CONFIG), dtype=dtype, state_dtype=dtype, optimizer=OPTIMIZER,
        lora=options,
    )  # fmt: skip
    arrays = dict(trainer.module.state_arrays(state))
    for name, array in make_adapters(CONFIG, options).arrays.items():
        arrays[f"parameters.{name}"] = array
    return trainer.module.load_state_arrays(state, arrays)


def merged_params(config: GriffinConfig, options: LoraOptions) -> dict[str, np.ndarray]:
    adapters = make_adapters(config, options)
    params = make_params(config)
    return {
        spec.path: merge(spec, params[spec.path], adapters.arrays, options)
        for spec in layer_spec(config)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_unmerged_are_the_reference(trainer: Trainer, kind: str) -> None:
    """In float64: the adapted model, its merged parameters, and the definition."""
    options, batch = KINDS[kind], make_batch(CONFIG, 0)
    expected = merged_params(CONFIG, options)
    logits, _ = reference.forward(CONFIG, expected, batch.tokens, batch.segment_pos)
    real = batch.segment_pos >= 0
    with trainer.precision("float64"):
        state = with_adapters(trainer, options, "float64")
        unmerged = trainer.logits(state, batch)
        params = trainer.parameters(state)
    assert_close(unmerged[real], logits[real], "logits", "float64")
    plain = make_params(CONFIG)
    for spec in layer_spec(CONFIG):
        value = expected[spec.path]
        assert_close(params[spec.path], value, "gradient", "float64", name=spec.path)
        changes = spec.lora in options.targets or (options.quantize and spec.matrix)
        assert (np.abs(value - plain[spec.path]).max() > 1e-5) == changes


@pytest.mark.parametrize("kind", sweep(["quantized"], list(KINDS)))
def test_merged_is_unmerged_in_float32(trainer: Trainer, kind: str) -> None:
    """The logits agree within the tolerance of logits, as after a real run."""
    options, batch = KINDS[kind], make_batch(CONFIG, 0)
    state = with_adapters(trainer, options, "float32")
    state, _ = trainer.steps(state, [batch])
    unmerged = trainer.logits(state, batch)
    network = trainer.backend.griffin(CONFIG, trainer.parameters(state), "float32")
    merged, _ = network(batch.tokens, batch.segment_pos)
    assert_close(unmerged, merged, "logits", "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_are_trained(trainer: Trainer, kind: str) -> None:
    options = KINDS[kind]
    state = trainer.state(CONFIG, make_params(CONFIG), optimizer=OPTIMIZER, lora=options)
    before = {name: array.copy() for name, array in trainer.module.state_arrays(state).items()}
    base = {path: value.copy() for path, value in frozen(trainer, state).items()}
    assert base.keys() == {spec.path for spec in layer_spec(CONFIG)}
    state, metrics = trainer.steps(state, [make_batch(CONFIG, seed) for seed in range(3)])
    after = trainer.module.state_arrays(state)
    names = {spec.path for spec in trainable_specs(CONFIG, options)}
    assert {name.partition(".")[2] for name in after if name != "step"} == names
    for name in names:
        moved = np.abs(after[f"parameters.{name}"] - before[f"parameters.{name}"]).max()
        assert moved > 1e-4, f"{name} did not move"
    for path, value in frozen(trainer, state).items():
        np.testing.assert_array_equal(value, base[path], err_msg=path)
    assert metrics["loss"][-1] < metrics["loss"][0]
    if trainer.name == "torch":
        learning = {id(p) for p in state.model.parameters() if p.requires_grad}
        assert learning == {id(p) for p in state.parameters.values()}
        assert all(p.grad is None for p in state.model.parameters() if not p.requires_grad)


def frozen(trainer: Trainer, state: Any) -> dict[str, np.ndarray]:
    """The frozen parameters of a state by path; int8 values where they are quantised."""
    if trainer.name == "jax":
        from recurrentgemma.jax.runtime.trees import get_path

        leaves = {spec.path: get_path(state.base, spec.path) for spec in layer_spec(CONFIG)}
        return {
            p: np.asarray(v.values if isinstance(v, Quantized) else v) for p, v in leaves.items()
        }
    from recurrentgemma.torch.quantization import QuantizedMatrix, parameter

    values = {spec.path: parameter(state.model, spec) for spec in layer_spec(CONFIG)}
    return {
        path: (value.values if isinstance(value, QuantizedMatrix) else value).detach().numpy()
        for path, value in values.items()
    }


def test_the_base_is_shared_and_stays(trainer: Trainer) -> None:
    """The model given is not changed, and its tensors are not copied."""
    if trainer.name == "jax":
        from recurrentgemma.jax import Griffin, create_train_state, init_params
        from recurrentgemma.jax.runtime.trees import get_path

        params = init_params(CONFIG, 0)
        state = create_train_state(Griffin(CONFIG), params, lora=LoraOptions())
        assert state.base is not None
        for spec in layer_spec(CONFIG):
            assert get_path(state.base, spec.path) is get_path(params, spec.path)
        return
    from recurrentgemma.torch import Griffin, create_train_state
    from recurrentgemma.torch.lora import Adapted

    model = Griffin(CONFIG)
    names = [name for name, _ in model.named_modules()]
    state = create_train_state(model, lora=LoraOptions())
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    own = {parameter.data_ptr() for parameter in model.parameters()}
    adapters = {parameter.data_ptr() for parameter in state.parameters.values()}
    assert {p.data_ptr() for p in state.model.parameters()} == own | adapters
    assert any(isinstance(module, Adapted) for module in state.model.modules())


def test_a_bfloat16_base(trainer: Trainer) -> None:
    """On a bfloat16 base the adapters are float32, and learn as they do on a float32 base."""
    options, batch = KINDS["every"], make_batch(CONFIG, 0)
    losses = []
    for dtype in ("bfloat16", "float32"):
        kwargs = {"optimizer": OPTIMIZER, "lora": options}
        state = trainer.state(CONFIG, make_params(CONFIG), dtype=dtype, **kwargs)
        state, metrics = trainer.steps(state, [batch] * 8)
        losses.append(metrics["loss"])
        dtypes = {array.dtype for name, array in trainer.module.state_arrays(state).items()}
        assert dtypes == {np.dtype(np.float32), np.dtype(np.int64)}
    assert_close(losses[0], losses[1], "output", "bfloat16")
    assert losses[0][-1] < 0.8 * losses[0][0]


def test_the_quantized_base_is_the_same_in_both(trainers: tuple[Trainer, Trainer]) -> None:
    options = KINDS["quantized"]
    one, other = (
        frozen(trainer, trainer.state(CONFIG, make_params(CONFIG), lora=options))
        for trainer in trainers
    )
    for spec in layer_spec(CONFIG):
        held = one[spec.path]  # quantised values lie alike in both
        turned = held if spec.matrix else to_torch(spec.path, held)
        np.testing.assert_array_equal(turned, other[spec.path], err_msg=spec.path)
        assert (held.dtype == np.int8) == spec.matrix


@pytest.mark.parametrize("targets", [("attention", "recurrent", "mlp"), EVERY])
def test_adapters_are_small(targets: tuple[str, ...]) -> None:
    """At rank 8, in float32, under 1 % of the 2B model in bfloat16."""
    config = GriffinConfig.from_preset(Preset.RECURRENT_GEMMA_2B_V1)
    count = num_trainable(config, LoraOptions(rank=8, targets=targets))
    assert 4 * count < 0.01 * 2 * num_parameters(config)
    assert count > 9_000_000


@pytest.mark.parametrize("writer", [0, 1])
def test_files_go_to_the_other_framework(
    trainers: tuple[Trainer, Trainer], writer: int, tmp_path: Path
) -> None:
    """One twin loads what the other saved, and both merge it to the same parameters."""
    options = KINDS["quantized"]
    trainer = trainers[writer]
    state = with_adapters(trainer, options, "float32")
    state, _ = trainer.steps(state, [make_batch(CONFIG, 0)])
    trainer.module.save_adapters(tmp_path / ADAPTERS, state)
    expected = trainer.parameters(state)
    for reader in trainers:
        base = reader.state(CONFIG, make_params(CONFIG))
        if reader.name == "jax":
            tree = reader.module.parameters(base)
            merged = reader.module.load_adapters(tmp_path, base.model, tree)
            from recurrentgemma.jax.runtime.trees import get_path

            given = {s.path: np.asarray(get_path(merged, s.path)) for s in layer_spec(CONFIG)}
        else:
            merged = reader.module.load_adapters(tmp_path / ADAPTERS, base.model).state_dict()
            given = {
                s.path: to_torch(s.path, merged[torch_name(s.path)].numpy())
                for s in layer_spec(CONFIG)
            }
        for path, value in expected.items():
            assert_close(given[path], value, "gradient", "float32", name=path)
    with pytest.raises(DestinationError, match="exists"):
        trainer.module.save_adapters(tmp_path / ADAPTERS, state)
    trainer.module.save_adapters(tmp_path / ADAPTERS, state, force=True)


def test_no_adapters_to_save(trainer: Trainer, tmp_path: Path) -> None:
    state = trainer.state(CONFIG, make_params(CONFIG))
    with pytest.raises(ValueError, match="created without lora"):
        trainer.module.save_adapters(tmp_path / ADAPTERS, state)


def test_a_file_round_trips(tmp_path: Path) -> None:
    adapters = make_adapters(CONFIG, KINDS["every"])
    write_adapters(tmp_path / ADAPTERS, adapters)
    for path in (tmp_path, tmp_path / ADAPTERS):
        config, options, arrays = read_adapters(path, CONFIG)
        assert (config, options) == (CONFIG, KINDS["every"])
        assert list(arrays) == list(adapters.arrays)
        for name, array in adapters.arrays.items():
            np.testing.assert_array_equal(arrays[name], array)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    adapters = make_adapters(CONFIG, KINDS["every"])
    file = tmp_path / ADAPTERS

    def write(**changes: Any) -> None:
        write_adapters(file, adapters._replace(**changes), force=True)

    def fails(error: type[CheckpointError], message: str, config: Any = CONFIG) -> None:
        with pytest.raises(error, match=message):
            read_adapters(file, config)

    fails(UnknownFormatError, "no adapters at")
    write()
    fails(ConfigError, "logits_soft_cap is 0.0, the model has 5.0",
          dataclasses.replace(CONFIG, logits_soft_cap=5.0))  # fmt: skip
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    fails(DamagedError, "no complete safetensors file")
    file.write_bytes(data.replace(b'"rank', b'"runk'))
    fails(DamagedError, "header is damaged")
    file.write_bytes(data.replace(b"recurrentgemma-adapters", b"recurrentgemma-adopters"))
    fails(UnknownFormatError, "no adapters of ours")
    write(arrays={**adapters.arrays, "more": np.zeros(2, np.float32)})
    fails(MismatchError, "unexpected more")
    name, array = next(iter(adapters.arrays.items()))
    write(arrays={**adapters.arrays, name: np.full_like(array, np.nan)})
    fails(NonFiniteError, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"targets": ()}, "targets must be some of attention, recurrent, mlp, gates"),
        ({"targets": ("embedder",)}, "targets must be some of"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraOptions(**changes)


def test_no_such_targets() -> None:
    with pytest.raises(ValueError, match="no parameters of the targets"):
        lora_targets(make_config("RR"), LoraOptions(targets=("attention",)))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_computes_the_same(tmp_path: Path) -> None:
    """`transformers` with PEFT's adapters on the same base gives the merged parameters' logits."""
    pytest.importorskip("torch.nn", reason="torch is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import torch
    import transformers

    from recurrentgemma_conversion import Format
    from recurrentgemma_conversion.names import layout
    from recurrentgemma_conversion.names.griffin import to_fields

    config = make_config(width=32, lru_width=32, num_heads=2, attention_window_size=64)
    options = LoraOptions(rank=3, alpha=6.0)
    params, batch = make_params(config), make_batch(config, 0, rows=1)
    write_peft(tmp_path / "peft", make_adapters(config, options))
    with pytest.raises(DestinationError, match="exists"):
        write_peft(tmp_path / "peft", make_adapters(config, options))

    fields = to_fields(config, "float32")
    model = transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(**{k: v for k, v in fields.items() if k != "dtype"})
    )
    names = layout(config, Format.HUGGINGFACE)
    stored = names.encode(lambda spec: params[spec.path])
    state = {name: torch.tensor(np.ascontiguousarray(tensor)).float() for name, tensor in stored}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("lm_head" in name or "normalizer" in name for name in missing)
    model = model.eval()
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "peft"))
    loaded = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert len(loaded) == sum(2 * len(names.pieces[t.path]) for t in lora_targets(config, options))
    with torch.no_grad():
        given = adapted(torch.tensor(batch.tokens).long(), use_cache=False).logits.numpy()
    expected, _ = reference.forward(
        config, merged_params(config, options), batch.tokens, batch.segment_pos
    )
    assert_close(given, expected, "logits", "float32")
    plain, _ = reference.forward(config, params, batch.tokens, batch.segment_pos)
    assert np.abs(expected - plain).max() > 0.1


def test_peft_has_no_gates(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormatError, match="input_gate_weight, which is no linear layer"):
        write_peft(tmp_path / "peft", make_adapters(CONFIG, KINDS["every"]))
    assert not (tmp_path / "peft").exists()
