"""Registers and spills of the Triton kernels, compiled ahead of time without a GPU.

python benchmarks/triton_registers.py > benchmarks/results/triton_registers.md
"""

from __future__ import annotations

import itertools
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterable
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recurrentgemma.common.quantization import SCHEMES
from recurrentgemma.torch.runtime import triton_products
from recurrentgemma.torch.scan import triton as scan_triton
from recurrentgemma.torch.scan import triton_kernels

ARCHITECTURES = (75, 80, 90)
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
KERNELS = ("forward", "backward", "summarize", "summarize adjoint")
WIDE = {"a_param", "h0", "dlast", "last", "ends", "totals", "da_param", "dh0"}
CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


PROCESSORS = {75: 40, 80: 108, 90: 132}  # of the T4, the A100 and the H100
OUTPUTS = (1024, 7680, 256_000)  # of a matrix
INPUTS = 2560


class Usage(NamedTuple):
    """Registers per thread, and bytes that a thread spills to memory."""

    registers: int
    spilled: int


def compile_kernel(
    kernel: str, dtype: str, architecture: int, gated: bool, a_thread: int, steps: int
) -> Usage:
    """Compiles one kernel with all of its optional arguments.

    Args:
      kernel: One of `KERNELS`.
      dtype: The dtype of the sequences.
      architecture: 90 for sm_90.
      gated: Whether to compile for `rg_lru_scan`, or for `linear_scan`.
      a_thread: Channels of a thread.
      steps: Of a tile.
    """
    name, *adjoint = kernel.split()
    function = getattr(triton_kernels, name)
    constants: dict[str, Any] = {"REVERSE": False, "STEPS": steps, "CHANNELS": 32 * a_thread}
    if name == "summarize":
        constants["ADJOINT"] = bool(adjoint)
    absent = {"input_gate", "a_param", "dinput_gate", "da_param"} if not gated else set()
    absent |= {"x"} if name == "backward" and not gated else set()
    absent |= {"input_gate"} if adjoint else set()
    constants |= dict.fromkeys(absent & set(function.arg_names))
    types = dict.fromkeys(function.arg_names, f"*{dtype}")
    types |= dict.fromkeys(WIDE, "*fp32") | dict.fromkeys(("T", "D", "chunk"), "i32")
    types |= {"position": "*i64" if gated else "*i8"}
    return _compiled(function, types, constants, {"D"}, architecture, scan_triton.COMPILER_OPTIONS)


def compile_product(scheme: str, dtype: str, architecture: int, outputs: int) -> Usage:
    """Compiles the product of rows with a quantised matrix.

    Args:
      scheme: The scheme of the matrix.
      dtype: The dtype of the rows, and of the result.
      architecture: 90 for sm_90.
      outputs: Outputs of the matrix.
    """
    bits, size = SCHEMES[scheme]
    stored = INPUTS * bits // 8
    groups = INPUTS // (size or INPUTS)
    itemsize, processors = DTYPES[dtype], PROCESSORS[architecture]
    cut = triton_products.tiling((1, outputs, stored), groups, bits, itemsize, processors)
    constants: dict[str, Any] = {"OUTPUTS": cut.outputs, "BLOCK": cut.block}
    constants["ROWS"] = triton_products.ROWS
    function = triton_products.multiply
    types = dict.fromkeys(function.arg_names, "i32") | {"x": f"*{dtype}", "y": f"*{dtype}"}
    types |= {"values": "*i8", "scale": "*fp32"}
    if size is None:
        constants["zero"] = None
    else:
        types |= {"values": "*u8", "zero": "*i8"}
    options = {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
    return _compiled(
        function, types, constants, {"N", "stored", "group", "step", "apart"}, architecture, options
    )


def _compiled(
    function: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    divisible: set[str],
    architecture: int,
    options: dict[str, int],
) -> Usage:
    """Compiles a kernel for types, constants, and numbers that 16 divides, as pointers are."""
    types |= dict.fromkeys(constants, "constexpr")
    indices = {argument: (i,) for i, argument in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        {argument: types[argument] for argument in function.arg_names},
        {indices[argument]: value for argument, value in constants.items()},
        {
            indices[argument]: [["tt.divisibility", 16]]
            for argument in function.arg_names
            if argument in divisible or types[argument].startswith("*")
        },
    )
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .* LOCAL:(\d+)", done.stdout)
    assert found, done.stdout
    registers, *memory = map(int, found.groups())
    return Usage(registers, sum(memory))


def tiles(kernel: str, dtype: str) -> list[tuple[int, int]]:
    """Channels of a thread and steps of a tile in the cuts that `tiling` makes for long texts."""
    adjoint = kernel in ("backward", "summarize adjoint")
    elements = scan_triton.BACKWARD_ELEMENTS if adjoint else scan_triton.FORWARD_ELEMENTS
    cuts = {
        scan_triton.tiling(
            (1, 64, width), DTYPES[dtype], elements, scan_triton.Processors(number=1, lanes=32)
        )[:2]
        for width in (2**12, 2**11, 2**10, 2**9, 2**8, 2**7, 1)
    }
    return [(channels // 32, steps) for channels, steps in sorted(cuts, reverse=True)]


def main() -> None:
    """Prints two tables, as Markdown."""
    print(
        f"# Registers of the Triton kernels\n\nTriton {triton.__version__}, one warp a program.\n"
    )
    _head(["scan", "kernel", "dtype", "channels x steps a thread"], ARCHITECTURES)
    for gated, kernel, dtype in itertools.product((False, True), KERNELS, DTYPES):
        for a_thread, steps in tiles(kernel, dtype):
            usages = [
                compile_kernel(kernel, dtype, architecture, gated, a_thread, steps)
                for architecture in ARCHITECTURES
            ]
            scan = "rg_lru_scan" if gated else "linear_scan"
            _row([scan, kernel, dtype, f"{a_thread} x {steps}"], usages)
    products()


def products() -> None:
    """Prints the table of products with quantised matrices."""
    architectures = [architecture for architecture in ARCHITECTURES if architecture >= 80]
    print(f"\nProducts of 16 rows with matrices of {INPUTS} inputs, one to four warps a program:\n")
    _head(["scheme", "dtype of the rows", "outputs"], architectures)
    for scheme, dtype, outputs in itertools.product(SCHEMES, DTYPES, OUTPUTS):
        usages = [compile_product(scheme, dtype, each, outputs) for each in architectures]
        _row([scheme, dtype, str(outputs)], usages)


def _head(names: list[str], architectures: Iterable[int]) -> None:
    columns = [*names, *(f"sm_{each}" for each in architectures), "spilled bytes"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")


def _row(cells: list[str], usages: list[Usage]) -> None:
    cells += [str(usage.registers) for usage in usages]
    cells += ["/".join(str(usage.spilled) for usage in usages)]
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
