"""The Pallas kernels beyond the shared suite: transforms, races, lowering, who may run them."""

import contextlib
import functools
import sys

import numpy as np
import pytest
from scans import RGLRUCase, ScanCase, make_rg_lru, make_scan
from sweeps import LONG

from backends import BACKENDS
from backends.jax import PALLAS_TARGETS, small_tiles
from tolerances import assert_close

pytest.importorskip("jax.numpy", reason="jax is not installed")

import jax
import jax.numpy as jnp
from lowering import gpu_mesh

from recurrentgemma.jax import choose_implementation, linear_scan, rg_lru_scan
from recurrentgemma.jax.scan import pallas_target

OPERATIONS = ["linear_scan", "rg_lru_scan"]


def arguments(operation: str, shape: tuple[int, int, int]):
    """The operation with its integers bound, its float arguments, and the outputs' cotangents."""
    backend = BACKENDS["jax"]
    case: ScanCase | RGLRUCase
    if operation == "linear_scan":
        case = make_scan(*shape)
        x, a, h0, reset = backend.scan_arguments(*case.inputs, dtype="float32")

        def run_linear(x, a, h0, name):
            return linear_scan(x, a, h0, reset, implementation=name)

        run, floats = run_linear, (x, a, h0)
    else:
        case = make_rg_lru(*shape)
        *sequences, segment_pos, h0 = backend.rg_lru_arguments(*case.inputs, dtype="float32")

        def run_rg_lru(x, input_gate, a_gate, a_param, h0, name):
            return rg_lru_scan(x, input_gate, a_gate, a_param, segment_pos, h0, implementation=name)

        run, floats = run_rg_lru, (*sequences, h0)
    cotangents = tuple(jnp.asarray(value, jnp.float32) for value in (case.dy, case.dlast))
    return run, floats, cotangents


TRANSFORMS = [jax.jit, jax.checkpoint, jax.vmap]
# `jit` of each kernel; of the others one for each operation and each target.
TRANSFORMED = [
    pytest.param(operation, target, transform, id=f"{transform.__name__}-{operation}-{target}")
    for i, transform in enumerate(TRANSFORMS)
    for j, operation in enumerate(OPERATIONS)
    for k, target in enumerate(PALLAS_TARGETS)
    if LONG or i == 0 or (i + j + k) % 2
]


def evaluated(operation: str, name: str, transform, several: bool) -> list[np.ndarray]:
    """Values and gradients; with `several` on a mapped axis of two, one twice the other."""
    run, floats, cotangents = arguments(operation, (2, 17, 130))
    if several:
        floats, cotangents = jax.tree.map(lambda z: jnp.stack([z, 2 * z]), (floats, cotangents))

    @jax.jit
    def evaluate(floats, cotangents):
        outputs, pullback = jax.vjp(transform(functools.partial(run, name=name)), *floats)
        return outputs, pullback(cotangents)

    return list(map(np.asarray, jax.tree.leaves(evaluate(floats, cotangents))))


@functools.cache
def expected_of(operation: str, several: bool) -> list[np.ndarray]:
    return evaluated(operation, "xla", jax.vmap if several else lambda f: f, several)


@pytest.mark.parametrize(("operation", "target", "transform"), TRANSFORMED)
def test_transforms(operation: str, target: str, transform) -> None:
    """Values and gradients are those of XLA's implementation without the transform.

    Through the plain interpreter: the one that looks for races knows neither vmap nor remat.
    """
    several = transform is jax.vmap
    expected = expected_of(operation, several)
    as_they_are = transform is jax.jit
    tiles = contextlib.nullcontext() if as_they_are else small_tiles(target)
    with tiles, pallas_target(target, interpret=True):
        actual = evaluated(operation, "pallas", transform, several)
    assert len(actual) == len(expected) == {"linear_scan": 5, "rg_lru_scan": 7}[operation]
    for got, want in zip(actual, expected, strict=True):
        assert_close(got, want, "gradient", "float32")


def test_a_race_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    """Two programs in parallel that write one block: what the suite's check would catch."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def kernel(x, y):
        y[...] = x[...] + pl.program_id(0)

    x = jnp.zeros((8, 128))
    block = pl.BlockSpec((8, 128), lambda i: (0, 0))
    call = pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[block],
        out_specs=block,
        out_shape=x,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2),
    )
    try:
        jax.block_until_ready(call(x))
        message = capsys.readouterr().out
    except jax.errors.JaxRuntimeError as error:  # newer versions of JAX raise
        message = str(error)
    assert "RACE DETECTED" in message


def linear(reverse: bool, with_reset: bool, with_h0: bool):
    """`linear_scan` of x, a, h0 and positions, those that are asked for."""

    def run(x, a, h0, segment_pos):
        reset = segment_pos == 0 if with_reset else None
        return linear_scan(x, a, h0 if with_h0 else None, reset, reverse=reverse)

    return run


LOWERED = {
    "linear_scan": linear(reverse=False, with_reset=True, with_h0=True),
    "linear_scan, no reset, reverse": linear(reverse=True, with_reset=False, with_h0=True),
    "linear_scan, x and a alone": linear(reverse=False, with_reset=False, with_h0=False),
    "rg_lru_scan": lambda x, a, h0, position: rg_lru_scan(x, a, x, x[0, 0], position, h0),
}


# Each operation for each platform; those with all arguments in both dtypes, the others in turn.
NUMBERS = [("float32", False), ("bfloat16", False), ("float32", True)]
LOWERINGS = [
    (name, length, platform, *numbers)
    for i, (name, length) in enumerate(
        [*((name, 300) for name in LOWERED), ("linear_scan, x and a alone", 48)]
    )
    for j, platform in enumerate(["tpu", "cuda"])
    for k, numbers in enumerate(NUMBERS)
    if LONG or k == (i + j + 2) % 3 or (k < 2 and name in OPERATIONS)
]


@pytest.mark.parametrize(("operation", "length", "platform", "dtype", "x64"), LOWERINGS)
def test_lowers_for_an_accelerator(
    operation: str, length: int, platform: str, dtype: str, x64: bool
) -> None:
    """Forward and backward, as "auto" chooses: whole blocks of steps or not, chunks or none."""

    def evaluate(x, a, h0, segment_pos, dy, dlast):
        outputs, pullback = jax.vjp(
            lambda *floats: LOWERED[operation](*floats, segment_pos), x, a, h0
        )
        return outputs, pullback((dy, dlast))

    x = jax.ShapeDtypeStruct((2, length, 130), dtype)
    h0 = jax.ShapeDtypeStruct((2, 130), "float32")
    segment_pos = jax.ShapeDtypeStruct((2, length), "int32")
    target, kernel = {"tpu": ("tpu", "tpu_custom_call"), "cuda": ("gpu", "triton")}[platform]
    on_gpu = platform == "cuda"
    device = jax.sharding.use_abstract_mesh(gpu_mesh()) if on_gpu else contextlib.nullcontext()
    with jax.enable_x64(x64), pallas_target(target), device:
        traced = jax.jit(evaluate).trace(x, x, h0, segment_pos, x, h0)
        lowered = traced.lower(lowering_platforms=(platform,))
    assert kernel in lowered.as_text()


@pytest.mark.usefixtures("unchecked_types")
def test_only_where_there_is_a_kernel() -> None:
    case = make_scan(1, 9, 4)
    x, a, h0, _ = BACKENDS["jax"].scan_arguments(*case.inputs, dtype="float32")
    message = r"'pallas' runs on tpu and gpu, got cpu, which runs reference, xla, associative"
    with pytest.raises(ValueError, match=message):
        linear_scan(x, a, h0, implementation="pallas")
    message = r"'pallas' takes float32 and bfloat16, got float16, which reference, xla, associative"
    with pallas_target("tpu"), pytest.raises(ValueError, match=message):
        linear_scan(x.astype("float16"), a, h0, implementation="pallas")


def test_a_jax_that_has_given_up_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then "auto" does without the kernel on a GPU; on a TPU nothing changes."""
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delitem(sys.modules, "recurrentgemma.jax.scan.pallas_gpu", raising=False)
    choice = choose_implementation((1, 9, 4), "float32", "gpu")
    assert choice.name == "associative"
    assert jax.__version__ in choice.reason
    assert choose_implementation((1, 9, 4), "float32", "tpu").name == "pallas"

    x = jnp.ones((1, 9, 4))
    with pallas_target("gpu"):
        lowered = jax.jit(linear_scan).trace(x, x).lower(lowering_platforms=("cuda",))
        assert "triton" not in lowered.as_text()
        message = r"on gpu needs jax\.experimental\.pallas\.triton, which JAX .* for auto or one of"
        with pytest.raises(ValueError, match=message):
            linear_scan(x, x, implementation="pallas")


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "name"),
    [
        ((1, 1, 4), "float32", "tpu", "reference"),
        ((1, 8, 4), "float32", "cpu", "reference"),
        ((1, 9, 4), "float32", "cpu", "xla"),
        ((1, 9, 4), "float64", "cpu", "xla"),
        ((1, 9, 4), "bfloat16", "tpu", "pallas"),
        ((1, 9, 4), "float32", "gpu", "pallas"),
        ((1, 9, 4), "float64", "gpu", "associative"),
        ((1, 9, 4), "float32", "rocm", "associative"),
        ((1, 9, 4), "float32", None, "xla"),
    ],
)
def test_choice(shape, dtype, device, name) -> None:
    choice = choose_implementation(shape, dtype, device)
    assert choice.name == name
    assert choice.reason
    if device is None:
        assert choose_implementation(shape, dtype, jax.devices("cpu")[0]) == choice
