"""The twins have the same files, names, arguments and defaults, except those listed here.

A listed name that no longer differs fails, too.
"""

import fnmatch
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("jax.numpy", reason="jax is not installed")
pytest.importorskip("torch.nn", reason="torch is not installed")

import jax.numpy as jnp

import recurrentgemma.jax
import recurrentgemma.torch
from recurrentgemma.common.twin import Twin, find_twin

TWINS: dict[str, ModuleType] = {"jax": recurrentgemma.jax, "torch": recurrentgemma.torch}
METHODS = {"forward": "__call__"}  # PyTorch's name for it
MODULES = (
    "BlockDiagonalLinear",
    "Conv1D",
    "LocalAttentionBlock",
    "MLPBlock",
    "RGLRU",
    "RMSNorm",
    "RecurrentBlock",
    "ResidualBlock",
)
MODELS = ("Griffin", "Model")  # two names of one class
FACADES = ("LocalAttentionBlock", "ResidualBlock")  # built of others in `setup`
ONE_SIDED = {"utils"}  # published in JAX alone
# Names that differ, by the reason.
ALLOWED = {
    "a Flax module has no parameters, and gets its place in the tree from Flax": [
        *(f"{module}({name})" for module in (*MODULES, *MODELS) for name in ("name", "parent")),
        *(
            f"{module}(scan_type)"
            for module in MODULES
            if module not in ("RecurrentBlock", "RGLRU")
        ),
        *(
            f"{module}.{member}"
            for module in FACADES
            for member in ("build", "setup", "__call__(*")
        ),
        *(f"{model}.setup" for model in MODELS),
        *(f"{model}.{method}*" for model in MODELS for method in ("apply", "init_with_output")),
        "Sampler(params)",
        "Sampler.params",
        "TrainState(base)",
        "TrainState.replace*",
        "create_train_state(params)",
        "init_params*",
        "load_adapters(params)",
        "loss_fn(adapters)",
        "loss_fn(lora)",
        "loss_fn(params)",
        "save_checkpoint(config)",
        "save_checkpoint(model)",
        "save_checkpoint(params)",
    ],
    "parameters have a dtype of their own in Flax, and a device in PyTorch": [
        f"{module}({name})" for module in (*MODULES, *MODELS) for name in ("device", "param_dtype")
    ],
    "JAX splits arrays over a mesh by what it is told, PyTorch's FSDP by hooks": [
        *(f"{module}(scan_sharding_spec)" for module in (*MODULES, *MODELS)),
        *(f"{module}(mesh)" for module in MODULES),
        "make_mesh(*)",  # JAX's mesh may be of some devices alone
        *(f"{model}.hidden(part)" for model in MODELS),
        *(f"{model}(scan_layers)" for model in MODELS),  # PyTorch compiles no step
        "ShardingSpec*",
        "linear_scan(sharding_spec)",
        "load_checkpoint(sharding)",  # another default
        "rg_lru_scan(sharding_spec)",
    ],
    "as the published packages have it": [
        "*.init_cache(device)",
        "BlockDiagonalLinear(width*)",
        "RGLRU(min_rad)",
        "RGLRU(only_real)",
        *(f"{model}.load_state_dict*" for model in MODELS),
        "linear_scan(scan_type)",
        "rnn_scan*",
        "Sampler(deterministic_sampling)",
        "Sampler(greedy_sampling)",
        "load_parameters*",
        "save_parameters*",
    ],
    "on a CPU XLA multiplies fast with one form of a matrix, which a tree of parameters has not": [
        "load_checkpoint(decoding)"
    ],
    "a decode step is compiled at once in JAX, and in minutes by PyTorch": ["Sampler(jit_compile)"],
}


def test_files() -> None:
    """A file at the top of one twin is in the other; `scan` and `runtime` may differ inside."""
    one, other = (
        {path.name.removesuffix(".py") for path in Path(module.__path__[0]).iterdir()}
        for module in TWINS.values()
    )
    assert (one ^ other) - {"__pycache__"} <= ONE_SIDED


@pytest.mark.parametrize("name", TWINS)
def test_the_protocol(name: str) -> None:
    """A twin has the protocol's members in its order, with its arguments, and no others."""
    made = vars(type(find_twin(name)))
    members = [member for member in made if not member.startswith("_")]
    methods = [member for member in vars(Twin) if not member.startswith("_")]
    assert members == [*inspect.get_annotations(Twin), *methods]
    for method in methods:
        if isinstance(made[method], property):
            assert isinstance(vars(Twin)[method], property)
            continue
        wanted = inspect.signature(getattr(Twin, method)).parameters
        given = inspect.signature(made[method]).parameters
        assert [(p.name, p.kind, p.default) for p in given.values()] == [
            (p.name, p.kind, p.default) for p in wanted.values()
        ]


def defaults(function: Any) -> dict[str, str]:
    """Each argument and its default, as text; a dtype has the same name in both."""
    parameters = inspect.signature(function).parameters
    return {name: text(p.default) for name, p in parameters.items() if name != "self"}


def text(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return "required"
    if isinstance(default, type(jnp.float32)):
        return jnp.dtype(default).name
    return str(default).removeprefix("torch.")


def api(twin: str) -> dict[str, str]:
    """Every public name, method and argument, with its default."""
    found: dict[str, str] = {}
    for name in TWINS[twin].__all__:
        value = getattr(TWINS[twin], name)
        found[name] = "class" if inspect.isclass(value) else "function"
        if not callable(value) or not value.__module__.startswith("recurrentgemma."):
            continue
        found |= {f"{name}({arg})": default for arg, default in defaults(value).items()}
        if inspect.isclass(value):
            found |= members(name, value)
    return found


def members(name: str, cls: type) -> dict[str, str]:
    found = {}
    # `SpecModule` is a twin's own way to build its modules.
    own = [
        base
        for base in cls.__mro__
        if base.__module__.startswith("recurrentgemma.") and base.__name__ != "SpecModule"
    ]
    for method in {key: None for base in own for key in vars(base)}:
        public = METHODS.get(method, method)
        if public.startswith("_") and public != "__call__":
            continue
        value = inspect.getattr_static(cls, method)
        value = getattr(value, "__func__", value)
        if inspect.isfunction(value):
            found[f"{name}.{public}"] = "method"
            found |= {f"{name}.{public}({a})": default for a, default in defaults(value).items()}
        elif isinstance(value, property):
            found[f"{name}.{public}"] = "property"
    return found


def differences() -> dict[str, tuple[str, str]]:
    one, other = api("jax"), api("torch")
    pairs = {key: (one.get(key, "absent"), other.get(key, "absent")) for key in {**one, **other}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def test_names_arguments_and_defaults() -> None:
    patterns = [pattern for listed in ALLOWED.values() for pattern in listed]
    beyond = {
        key: pair
        for key, pair in differences().items()
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
    }
    assert not beyond, f"JAX and PyTorch differ: {beyond}"


def test_every_listed_difference_is_one() -> None:
    differ = list(differences())
    for reason, listed in ALLOWED.items():
        for pattern in listed:
            assert fnmatch.filter(differ, pattern), f"{pattern} is the same in both ({reason})"


def test_what_is_compared() -> None:
    """The comparison sees functions, classes, methods and arguments."""
    for twin in TWINS:
        found = api(twin)
        for model in MODELS:
            for key in (model, f"{model}.__call__", f"{model}.__call__(last_logits_only)"):
                assert key in found
            assert found[f"{model}(gradient_checkpointing)"] == "True"
        assert found["linear_scan(implementation)"] == "auto"
        assert found["Sampler.stream"] == "method"
        assert found["Sampler.__call__(total_generation_steps)"] == "required"
