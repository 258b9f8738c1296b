"""Adapters in PEFT's layout: PEFT itself is the oracle, for each family and kind of adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import make_config
from checkpoints import write_checkpoint

from recurrentgemma.common.errors import (
    CheckpointError,
    ConfigError,
    DamagedError,
    MismatchError,
    NonFiniteError,
    UnknownFormatError,
)
from recurrentgemma.common.io.tensor_files import TensorFile, write_tensors
from recurrentgemma.common.model import reference
from recurrentgemma.common.model.gemma import GemmaConfig
from recurrentgemma.common.training.adapters import ADAPTERS, Adapters, write_adapters
from recurrentgemma.common.training.lora import LoraOptions, trainable_specs
from recurrentgemma_conversion import Format, open_checkpoint
from recurrentgemma_conversion.adapters import open_adapters
from recurrentgemma_conversion.peft import PEFT_CONFIG, PEFT_WEIGHTS, hub_name, write_peft
from tolerances import assert_close

CONFIGS: dict[str, Any] = {
    "griffin": make_config(vocab_size=2048, width=32, lru_width=32, attention_window_size=16),
    "gemma3": GemmaConfig.from_sizes(3, 2048, 24, 32, 7, 2, 1, 12, sliding_window=6),
}
LINEAR = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "linear_x"]
# The fields of a `LoraConfig` beside `target_modules`.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 7, "lora_dropout": 0.3, "init_lora_weights": "gaussian"},
    "some modules": {"r": 2, "target_modules": ["q_proj", "up_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 3,
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"up_proj": 9, r"layers\.2\..*[qv]_proj": 5},
    },
    "dora": {"r": 3, "lora_alpha": 5, "use_dora": True},
    "dora of some": {"r": 2, "use_dora": True, "use_rslora": True, "target_modules": ["o_proj"]},
}
OF_GRIFFIN = ("plain", "patterns", "dora")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a base in `transformers`' format."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("base") / family
            made[family] = write_checkpoint(folder, Format.HUGGINGFACE, CONFIGS[family])
        return made[family]

    return get


def tokens_of(config: Any) -> np.ndarray:
    return np.random.default_rng(0).integers(3, config.vocab_size, (1, 15))


def expected(config: Any, folder: Path, adapter: Path | None) -> np.ndarray:
    """The reference's logits of what is read."""
    with open_checkpoint(folder, adapter=adapter) as checkpoint:
        params = {spec.path: value.astype(np.float64) for spec, value in checkpoint}
    tokens = tokens_of(config)
    return reference.forward(config, params, tokens, np.arange(15)[None])[0]


def random_adapters(config: Any, options: LoraOptions) -> Adapters:
    rng = np.random.default_rng(1)
    arrays = {
        spec.path: (rng.standard_normal(spec.shape) / 4).astype(np.float32)
        for spec in trainable_specs(config, options)
    }
    return Adapters(config, options, arrays)


@pytest.fixture
def peft() -> Any:
    pytest.importorskip("torch.nn", reason="torch is not installed")
    return pytest.importorskip("peft", reason="peft is not installed")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in CONFIGS for kind in KINDS
     if family == "gemma3" or kind in OF_GRIFFIN],
)  # fmt: skip
def test_what_peft_saves_is_read(peft, base, tmp_path: Path, family: str, kind: str) -> None:
    """The logits of `transformers` under the adapters are those of the parameters that we read."""
    import torch
    import transformers

    config, folder = CONFIGS[family], base(family)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    fields = {"target_modules": [name for name in LINEAR if name in names], **KINDS[kind]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(0.5 + torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        tokens = torch.tensor(tokens_of(config))
        given = adapted.eval()(tokens, use_cache=False).logits.numpy()
    adapted.save_pretrained(str(tmp_path))
    wanted = expected(config, folder, tmp_path)
    assert_close(given, wanted, "logits", "float32")
    assert np.abs(wanted - expected(config, folder, None)).max() > 0.1
    if not KINDS[kind].get("use_dora"):  # written again, in our file's terms, they are the same
        write_peft(tmp_path / "again", open_adapters(tmp_path, config))
        again = expected(config, folder, tmp_path / "again")
        assert_close(again, wanted, "logits", "float32")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", CONFIGS)
def test_what_we_write_is_opened_by_its_name(peft, base, tmp_path: Path, family: str) -> None:
    """`AutoPeftModelForCausalLM` finds the base, and computes what we do."""
    import torch

    config = CONFIGS[family]
    adapters = random_adapters(config, LoraOptions(rank=3, targets=("attention", "mlp")))
    write_peft(tmp_path / "peft", adapters, base(family))
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft", dtype=torch.float32)
    with torch.no_grad():
        given = model.eval()(torch.tensor(tokens_of(config)), use_cache=False).logits.numpy()
    assert_close(given, expected(config, base(family), tmp_path / "peft"), "logits", "float32")


@pytest.mark.parametrize("family", CONFIGS)
def test_both_frameworks_load_them(backend, base, tmp_path: Path, family: str) -> None:
    """`load_checkpoint(adapter=...)` and `load_adapters` give the parameters of the definition."""
    config, folder = CONFIGS[family], base(family)
    adapters = random_adapters(config, LoraOptions(rank=2, targets=("attention", "mlp")))
    write_peft(tmp_path / "peft", adapters)
    with open_checkpoint(folder, adapter=tmp_path / "peft") as checkpoint:
        wanted = {spec.path: value for spec, value in checkpoint}
    loaded = backend.twin.load(folder, "float32", adapter=tmp_path / "peft")
    plain = backend.twin.load(folder, "float32")
    if backend.name == "jax":
        params = backend.module.load_adapters(tmp_path / "peft", plain.module, plain.params)
        later = plain._replace(params=params)
    else:
        later = backend.module.load_adapters(tmp_path / "peft", plain)
    unchanged = backend.twin.params(plain)
    for model in (loaded, later):
        for path, value in backend.twin.params(model).items():
            np.testing.assert_array_equal(value, wanted[path], path)
            same = f"{path}.lora_a" not in adapters.arrays
            assert np.array_equal(value, unchanged[path]) == same, path


def test_a_pickle_and_bfloat16(tmp_path: Path) -> None:
    """Older PEFT wrote a pickle; training in bfloat16 leaves adapters in it."""
    pytest.importorskip("torch.nn", reason="torch is not installed")
    import torch

    config = CONFIGS["griffin"]
    adapters = random_adapters(config, LoraOptions(rank=2))
    write_peft(tmp_path / "peft", adapters)
    file = TensorFile(tmp_path / "peft" / PEFT_WEIGHTS)
    tensors = {name: torch.tensor(file.read(name)).bfloat16() for name in file.tensors}
    (tmp_path / "peft" / PEFT_WEIGHTS).unlink()
    torch.save(tensors, tmp_path / "peft" / "adapter_model.bin")
    read = open_adapters(tmp_path / "peft" / "adapter_model.bin", config)
    assert read.options == adapters.options
    for name, array in adapters.arrays.items():
        rounded = torch.tensor(array).bfloat16().float().numpy()
        np.testing.assert_array_equal(read.arrays[name], rounded)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    config, folder = CONFIGS["griffin"], tmp_path / "peft"
    write_peft(folder, random_adapters(config, LoraOptions(rank=2)))
    fields = json.loads((folder / PEFT_CONFIG).read_text())
    file = TensorFile(folder / PEFT_WEIGHTS)
    tensors = {name: file.read(name).copy() for name in file.tensors}
    first = next(name for name in tensors if "lora_A" in name)
    module = first.removeprefix("base_model.model.").removesuffix(".lora_A.weight")

    def fails(error: type[CheckpointError], message: str, /, changes=None, **said: Any) -> None:
        kept = {n: t for n, t in (tensors | (changes or {})).items() if t is not None}
        (folder / PEFT_CONFIG).write_text(json.dumps(fields | said))
        write_tensors(folder / PEFT_WEIGHTS, kept, {})
        with pytest.raises(error, match=message):
            open_adapters(folder, config)

    fails(ConfigError, "peft_type must be LORA, got IA3", peft_type="IA3")
    fails(ConfigError, r"adapters with modules_to_save=\['lm_head'\], bias='all' are not supported",
          modules_to_save=["lm_head"], bias="all")  # fmt: skip
    fails(ConfigError, "init_lora_weights='pissa' are not", init_lora_weights="pissa")
    fails(ConfigError, "some_new_field=3 are not supported", some_new_field=3)
    fails(ConfigError, "alphas must be numbers", lora_alpha="8")
    fails(ConfigError, "lora_alpha must be positive, got -1", lora_alpha=-1)
    fails(MismatchError, f"{module} has no lora_B", {first.replace("lora_A", "lora_B"): None})
    fails(MismatchError, f"{module} of shape", {first: tensors[first][:, :-1].copy()})
    fails(MismatchError, "lm_head, which is no linear layer of the model",
          {f"base_model.model.lm_head.lora_{letter}.weight": np.zeros((2, 2), np.float32)
           for letter in "AB"})  # fmt: skip
    fails(MismatchError, "more than adapters of linear layers.*\n.*embed_tokens",
          {"base_model.model.model.embed_tokens.weight": np.zeros((2, 2), np.float32)})  # fmt: skip
    fails(MismatchError, f"{module} has no lora_magnitude_vector of shape", use_dora=True)
    fails(NonFiniteError, "NaN or infinity", {first: np.full_like(tensors[first], np.nan)})
    (folder / PEFT_WEIGHTS).unlink()
    with pytest.raises(DamagedError, match=f"lacks {PEFT_WEIGHTS}"):
        open_adapters(folder, config)
    with pytest.raises(UnknownFormatError, match="neither adapters"):
        open_adapters(tmp_path, config)


def test_adapters_alone_are_no_checkpoint(tmp_path: Path) -> None:
    """PEFT's folder and ours, and a file in it; the error names the base and the option."""
    adapters = random_adapters(CONFIGS["griffin"], LoraOptions(rank=2))
    write_peft(tmp_path / "peft", adapters, base="google/recurrentgemma-2b")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.toml").touch()
    write_adapters(tmp_path / "run" / ADAPTERS, adapters)
    for path, base in (
        (tmp_path / "peft", "give google/recurrentgemma-2b as the checkpoint"),
        (tmp_path / "peft" / PEFT_WEIGHTS, "give google/recurrentgemma-2b as"),
        (tmp_path / "run", "give the model that they were trained on as"),
        (tmp_path / "run" / ADAPTERS, "give the model that they were trained on as"),
    ):
        alone = pytest.raises(
            UnknownFormatError, match=rf"adapters and no model: {base}.*--adapter"
        )
        with alone, open_checkpoint(path):
            pass


def test_dora_is_not_written(tmp_path: Path) -> None:
    adapters = random_adapters(CONFIGS["griffin"], LoraOptions(rank=2))
    magnitude = {"blocks.0.mlp_block.ffw_down.kernel.lora_magnitude": np.ones(32, np.float32)}
    with pytest.raises(MismatchError, match="DoRA's adapters are merged, not written"):
        write_peft(tmp_path / "peft", adapters._replace(arrays={**adapters.arrays, **magnitude}))


def test_the_name_of_a_folder_in_the_hubs_cache() -> None:
    cached = Path("/x/hub/models--google--recurrentgemma-2b-it/snapshots/0a1b")
    assert hub_name(cached) == "google/recurrentgemma-2b-it"
    assert hub_name(Path("/x/recurrentgemma-2b-it")) is None
