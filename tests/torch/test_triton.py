"""The Triton kernels compiled ahead of time, and which implementation runs where."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("torch.nn", reason="torch is not installed")

ROOT = pathlib.Path(__file__).resolve().parents[2]
# In a process of its own: what is interpreted in this one is not compiled.
PROGRAM = """
import sys
from triton_registers import DTYPES, KERNELS, compile_kernel, tiles

for kernel in KERNELS:
    for dtype in DTYPES:
        usage = compile_kernel(kernel, dtype, int(sys.argv[1]), bool(int(sys.argv[2])),
                               *tiles(kernel, dtype)[0])
        print(kernel, dtype, *usage, sep=",")
"""


@pytest.mark.parametrize("gated", [False, True], ids=["linear_scan", "rg_lru_scan"])
@pytest.mark.parametrize("architecture", [75, 80, 90])
def test_compiles_without_spills(architecture: int, gated: bool) -> None:
    """The widest tiles, which need the most registers."""
    pytest.importorskip("triton", reason="triton is not installed")
    path = os.pathsep.join([str(ROOT / "benchmarks"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(architecture), str(int(gated))],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    usages = [line.split(",") for line in done.stdout.splitlines()]
    assert len(usages) == 12
    assert [usage for usage in usages if int(usage[-1]) > 0] == []
    assert all(0 < int(usage[-2]) <= 255 for usage in usages)


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
