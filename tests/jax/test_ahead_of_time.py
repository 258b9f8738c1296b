"""Pallas kernels, int8 products and training steps, compiled for devices that need not be there.

For TPUs with the `libtpu` wheel (`make tpu`), for the H200 with JAX's CUDA 12 plugin; each skips
where its compiler is not installed. One process a target: the compiler reads it once.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sweeps import LONG

from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.quantization import stored_bytes
from recurrentgemma.common.traffic import traffic

pytest.importorskip("jax.numpy", reason="jax is not installed")

TPUS = {  # the accelerator type, the topology
    "v3": ("v3-8", "v3:2x2"),
    "v4": ("v4-8", "v4:2x2x1"),
    "v5e": ("v5litepod-4", "v5e:2x2"),
    "v5p": ("v5p-8", "v5p:2x2x1"),
    "v6e": ("v6e-4", "v6e:2x2"),
}
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 threads_per_warp: 32 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448 l2_cache_size: 52428800
  threads_per_block_limit: 1024 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 clock_rate_ghz: 1.98 memory_bandwidth: 4800000000000
  device_memory_size: 150000000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
SHAPES = [(8, 4096, 2560), (1, 8192, 2560), (3, 1000, 500), (3, 7, 96), (1, 1, 2560)]

PROGRAM = r"""
import json, re, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from recurrentgemma.common.quantization import SCHEMES, Quantized, part_shapes
from recurrentgemma.jax import linear_scan, rg_lru_scan
from recurrentgemma.jax.products import OnGPU, product
from recurrentgemma.jax.runtime.stored import as_q8
from recurrentgemma.jax.scan import pallas_target

platform, topology, options, shapes = json.loads(sys.argv[1])
device = topologies.get_topology_desc(topology, platform=platform, **options).devices[0]
sharding = SingleDeviceSharding(device)

def array(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

def compiles(function, floats, others):
    def backward(floats, others, cotangents):
        return jax.vjp(lambda *floats: function(floats, others), *floats)[1](cotangents)

    with pallas_target(device.platform):
        jax.jit(function).lower(floats, others).compile()
        outputs = jax.eval_shape(function, floats, others)
        cotangents = tuple(array(*out.shape, dtype=out.dtype) for out in outputs)
        lowered = jax.jit(backward).lower(floats, others, cotangents)
        assert "custom_call" in lowered.as_text()
        lowered.compile()

compiled = 0
for batch, length, width in shapes:
    for dtype in (jnp.float32, jnp.bfloat16):
        x = array(batch, length, width, dtype=dtype)
        h0 = array(batch, width, dtype=jnp.float32)
        a_param = array(width, dtype=dtype)
        reset = array(batch, length, dtype=bool)
        position = array(batch, length, dtype=jnp.int32)
        for reverse in (False, True):
            for given in (None, reset):
                compiles(
                    lambda floats, reset: linear_scan(
                        *floats, reset, reverse=reverse, implementation="pallas"
                    ),
                    (x, x, h0),
                    given,
                )
        compiles(
            lambda floats, position: rg_lru_scan(
                *floats[:-1], position, floats[-1], implementation="pallas"
            ),
            (x, x, x, a_param, h0),
            position,
        )
        compiled += 10
def quantized(scheme, kind=Quantized, inputs=2560, outputs=7680):
    shapes = part_shapes((inputs, outputs), scheme)
    parts = (shapes.get(part) for part in ("", ".scale", ".zero"))
    held = (None if part is None else array(*part[0], dtype=part[1]) for part in parts)
    return kind(*held, scheme)

for rows in (1, 16 if device.platform == "gpu" else 64):
    x = array(rows, 2560, dtype=jnp.bfloat16)
    for scheme in SCHEMES if device.platform == "gpu" else ():
        with pallas_target("gpu"):
            program = jax.jit(product).lower(x, quantized(scheme, OnGPU)).compile()
        assert "triton" in program.as_text()
        assert program.memory_analysis().temp_size_in_bytes < 2**20  # no copy of the matrix
        compiled += 1
    if device.platform == "tpu":
        text = jax.jit(product).lower(x, quantized("q8")).compile().as_text()
        sums = rf"s32\[{rows},7680\]\S* (?:convolution|dot)\(%(\S+), %(\S+)\)"
        (factors,) = re.findall(sums, text)
        assert all(f"%{name} = s8[" in text for name in factors), text
        compiled += 1
for scheme in ("q4", "q4_32") if device.platform == "tpu" else ():
    as_q8.lower(quantized(scheme)).compile()
    compiled += 1
print(compiled, "programs for", device.device_kind)
"""


def compile_for(platform: str, topology: str, options: dict, env: dict[str, str]) -> str:
    arguments = json.dumps([platform, topology, options, SHAPES])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.parametrize("generation", TPUS)
def test_tpu(generation: str) -> None:
    kind, topology = TPUS[generation]
    env = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": kind,
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    assert compile_for("tpu", topology, {}, env).startswith("104 programs for TPU")


def compiled_step(topology: str, *options: str) -> dict:
    """What `train --compile-only` prints."""
    command = [
        sys.executable,
        "-m",
        "recurrentgemma",
        "train",
        "--json",
        "--compile-only",
        topology,
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.parametrize("mesh", ["fsdp=4", "fsdp=2,sequence=2"])
def test_a_training_step(mesh: str, tmp_path: Path) -> None:
    """A chip sends at most what `inspect` says: the compiler merges gathers of a small model."""
    from meshes import mesh_config

    path = tmp_path / "config.json"
    path.write_text(json.dumps(mesh_config().to_dict()))
    sizes = ("--batch-size", "8", "--length", "64", "--mesh", mesh)
    step = compiled_step("v5e:2x2", "--config", str(path), *sizes)
    assert step["device"].startswith("TPU v5")
    expected = traffic(mesh_config(), step["mesh"], 8, 64)
    assert step["computed"] == expected.collectives
    for kind in ("all-gather", "collective-permute"):
        assert 0 < step["sent"][kind] <= 1.02 * expected.collectives[kind], step


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_a_step_of_adapters_on_a_quantized_base(tmp_path: Path) -> None:
    """A chip holds a quarter of each matrix, in the bytes of its scheme."""
    from meshes import mesh_config

    config, path = mesh_config(width=512, mlp_expanded_width=2048), tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    sizes = ("--batch-size", "8", "--length", "64", "--mesh", "fsdp=4", "--lora-rank", "4")
    held, stored = [], []
    for scheme, flags in ((None, ()), ("q8", ("--quantize", "q8"))):
        held.append(compiled_step("v5e:2x2", "--config", str(path), *sizes, *flags)["held"])
        matrices = (spec for spec in layer_spec(config) if spec.matrix)
        stored.append(sum(stored_bytes(spec, 2, scheme) for spec in matrices) / 4)
    np.testing.assert_allclose(held[0] - held[1], stored[0] - stored[1], rtol=0.02)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.skipif(not LONG, reason="compiles for many minutes; see tests/sweeps.py")
@pytest.mark.parametrize("preset", ["RECURRENT_GEMMA_2B_V1", "RECURRENT_GEMMA_9B_V1"])
def test_published_models_on_256_chips(preset: str) -> None:
    """A step of the whole model, the Pallas scan included, fits a chip's 16 GB."""
    sizes = ("--batch-size", "256", "--length", "2048", "--mesh", "fsdp=256")
    step = compiled_step("v5e:16x16", "--preset", preset, *sizes)
    assert step["held"] + step["temporary"] <= 16e9


@pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda12_plugin"), reason="JAX's CUDA plugin is not installed"
)
def test_h200() -> None:
    options = {"target_config": H200, "topology": "1x1x1"}
    assert "106 programs for NVIDIA H200" in compile_for("cuda", "", options, {})
