"""The Triton kernels compiled ahead of time, and which implementation runs where."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from scans import linear_scan_grads, make_rg_lru, make_scan, rg_lru_scan_grads

from backends import BACKENDS
from recurrentgemma.common.model import reference
from recurrentgemma.common.quantization import SCHEMES
from tolerances import assert_close

pytest.importorskip("torch.nn", reason="torch is not installed")

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARCHITECTURES = (75, 80, 90)
# The narrowest programs with rows of 16 bits and the widest with float32, in turn.
PRODUCTS = [
    (80, "q8", "bf16", 1024),
    (80, "q4", "fp32", 256_000),
    (80, "q4_32", "fp16", 1024),
    (90, "q8", "fp32", 256_000),
    (90, "q4", "bf16", 1024),
    (90, "q4_32", "fp32", 256_000),
]
# In one process of its own: what is interpreted in this one is not compiled.
PROGRAM = """
import json, sys
from triton_registers import *

for architecture, scheme, dtype, outputs in json.loads(sys.argv[2]):
    usage = compile_product(scheme, dtype, architecture, outputs)
    print(json.dumps([architecture, scheme, *usage]))
for architecture in json.loads(sys.argv[1]):
    for gated in (False, True):
        for kernel in KERNELS:
            for dtype in DTYPES:
                cut = tiles(kernel, dtype)[0]
                usage = compile_kernel(kernel, dtype, architecture, gated, *cut)
                print(json.dumps([architecture, gated, kernel, dtype, *usage]))
"""


@pytest.fixture(scope="module")
def compiled() -> list[Any]:
    """Each program: architecture, whether gated or the scheme, ..., registers and spills."""
    pytest.importorskip("triton", reason="triton is not installed")
    path = os.pathsep.join([str(ROOT / "benchmarks"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(ARCHITECTURES), json.dumps(PRODUCTS)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("gated", [False, True], ids=["linear_scan", "rg_lru_scan"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(compiled: list[Any], architecture: int, gated: bool) -> None:
    """The widest tiles, which need the most registers."""
    usages = [usage for usage in compiled if usage[:2] == [architecture, gated]]
    assert len(usages) == 12
    assert [usage for usage in usages if usage[-1] > 0] == []
    assert all(0 < usage[-2] <= 255 for usage in usages)


@pytest.mark.parametrize("architecture", [80, 90])
def test_products_compile_without_spills(compiled: list[Any], architecture: int) -> None:
    usages = [usage for usage in compiled if usage[0] == architecture and usage[1] in SCHEMES]
    assert len(usages) == 3
    assert [usage for usage in usages if usage[-1] > 0] == []


@pytest.fixture
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts sequences from 16 steps on as it does long ones: interpreted steps are slow."""
    pytest.importorskip("triton", reason="triton is not installed")
    from recurrentgemma.torch.scan import triton as tiles

    monkeypatch.setattr(tiles, "_MIN_CHUNKED_LENGTH", 16)
    monkeypatch.setattr(tiles, "_MIN_CHUNK", 8)
    cut = tiles.tiling((2, 28, 3), 8, tiles.FORWARD_ELEMENTS, tiles.INTERPRETER)
    assert (cut.chunk, cut.num_chunks) == (8, 4)


def assert_all_close(states, expected, gradients, expected_gradients) -> None:
    for got, want in zip(states, expected, strict=True):
        assert_close(got, want, "state", "float64")
    for got, want in zip(gradients, expected_gradients, strict=True):
        assert_close(got, want, "gradient", "float64")


@pytest.mark.usefixtures("_short_chunks")
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_many_chunks(reverse: bool) -> None:
    case = make_scan(2, 28, 3)
    states, gradients = BACKENDS["torch"].linear_scan_vjp(
        *case.inputs, dy=case.dy, dlast=case.dlast, reverse=reverse, implementation="triton"
    )
    expected = reference.linear_scan(*case.inputs, reverse=reverse)
    assert_all_close(states, expected, gradients, linear_scan_grads(case, reverse))


@pytest.mark.usefixtures("_short_chunks")
def test_many_chunks_with_gates() -> None:
    case = make_rg_lru(2, 28, 3)
    states, gradients = BACKENDS["torch"].rg_lru_scan_vjp(
        *case.inputs, dy=case.dy, dlast=case.dlast, implementation="triton"
    )
    expected = reference.rg_lru_scan(*case.inputs)
    assert_all_close(states, expected, gradients, rg_lru_scan_grads(case))


def test_float16_keeps_a_float32_state() -> None:
    """Of the narrow dtypes the one that the interpreter rounds to; bfloat16 differs in no line."""
    pytest.importorskip("triton", reason="triton is not installed")
    import torch

    from recurrentgemma.torch import rg_lru_scan

    x, i, r = (torch.randn(1, 17, 5).half().requires_grad_() for _ in range(3))
    a_param, positions = torch.randn(5).half().requires_grad_(), torch.arange(17)[None]
    results = []
    for name in ("native", "triton"):
        y, last = rg_lru_scan(x, i, r, a_param, positions, implementation=name)
        loss = y.float().square().sum() + last.sum()
        results.append([y, last, *torch.autograd.grad(loss, (x, i, r, a_param))])
    assert results[1][0].dtype == torch.float16
    assert results[1][1].dtype == torch.float32
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=1e-6)
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=2**-9, atol=2**-9)


def test_choice() -> None:
    import torch

    from recurrentgemma.torch import choose_implementation
    from recurrentgemma.torch.scan import dispatch as scan

    assert choose_implementation((1, 8, 8), torch.float32, "cpu").name == "native"
    assert choose_implementation((1, 1, 8), torch.float32, "cpu").name == "reference"
    expected = "triton" if scan._HAS_TRITON else "native"
    assert choose_implementation((1, 8, 8), torch.float32, "cuda").name == expected
    assert choose_implementation((1, 8, 8), torch.float32, "mps").name == "native"


@pytest.mark.usefixtures("unchecked_types")
class TestErrors:
    def test_a_device_that_cannot(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        from recurrentgemma.torch import linear_scan
        from recurrentgemma.torch.scan import dispatch as scan

        x = torch.ones(1, 2, 3)
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        monkeypatch.setattr(scan, "_HAS_TRITON", True)
        with pytest.raises(ValueError, match=r"runs on cuda, got cpu, which runs reference, nat"):
            linear_scan(x, x, implementation="triton")
        monkeypatch.setattr(scan, "_HAS_TRITON", False)
        with pytest.raises(ValueError, match=r"needs the package triton.* native, associative"):
            linear_scan(x, x, implementation="triton")

    def test_dtypes_and_devices(self) -> None:
        import torch

        from recurrentgemma.torch import linear_scan, rg_lru_scan

        x, positions = torch.ones(1, 2, 3), torch.zeros(1, 2)
        with pytest.raises(
            ValueError, match=r"segment_pos must be of an integer dtype, got torch.f"
        ):
            rg_lru_scan(x, x, x, torch.ones(3), positions)
        with pytest.raises(ValueError, match=r"reset must be of a bool dtype, got torch.float32"):
            linear_scan(x, x, None, positions)
        with pytest.raises(ValueError, match=r"a must be on cpu like x, got meta"):
            linear_scan(x, x.to("meta"))
