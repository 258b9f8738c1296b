"""Quantised weights beside those of torchao, qwix and mlx-lm on a CPU: speed and error.

    python benchmarks/quantized_peers.py --torchao PYTHON --qwix PYTHON --mlx PYTHON --rounds 7

PYTHON is the interpreter of an environment with that library; one that is not given is left out.

    torchao  with transformers, whose RecurrentGemma it quantises: linear layers, and the head
    mlx      mlx-lm and mlx-cpu: their RecurrentGemma, with linear layers, the table and the head
    qwix     with JAX and Flax. It finds no parameters in our modules, so it has the matrices of the
             model in a stack of `flax.linen.Dense`; ours compute with the same stack, too

A step decodes one token, one row, with random weights of 185 million parameters (1024 wide, 12
layers, a vocabulary of 32,000). The error is the distance of the logits from those of the same
library in float32, relative to their length, of the bundled model on 512 tokens of each of two
chapters that it did not train on; so are the bits a byte. In a stack it is that of its outputs. All
libraries open the same folders, which `recurrentgemma convert --to huggingface` writes. Contenders
run in processes of their own, those of a library in turns, which needs up to 8 GB. On two idle
cores a run takes about ten minutes.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import Seconds, Task, Worker, measure, publish, serve, spread

ROOT = Path(__file__).resolve().parents[1]
SPEED, TEXT, TOKENS = "speed", "text", "tokens.npy"  # what a run makes
LENGTH = 512  # tokens of a chapter
WIDTH, MLP, LAYERS, VOCABULARY = 1024, 3072, 12, 32_000
OURS = ("float32", "q8", "q4", "q4_32")
STACKS = ("float32", "q8", "q4")
TORCHAO = ("float32", "int8", "int8, MLPs compiled", "int8 and int8 rows", "int4")
QWIX = {
    "float32": {},
    "int8": {"weight_qtype": "int8"},
    "int8 and int8 rows": {"weight_qtype": "int8", "act_qtype": "int8"},
    "int4": {"weight_qtype": "int4", "tile_size": 128},
}
MLX = {"float32": (), "8 bits by 64": (64, 8), "4 bits by 128": (128, 4), "4 bits by 32": (32, 4)}
STEP, SIZE, ERROR, BITS = "step", "bytes", "error", "bits"
Logits = Callable[[np.ndarray], np.ndarray]


def make_folders(home: Path) -> None:
    """The two models as `huggingface` folders, and the tokens of the chapters."""
    from quantized import values

    from recurrentgemma.common.io.arrays import DTYPES
    from recurrentgemma.common.io.checkpoint import load_tokenizer
    from recurrentgemma.common.model.griffin import GriffinConfig
    from recurrentgemma.common.model.layer_spec import layer_spec
    from recurrentgemma_conversion import Format, convert
    from recurrentgemma_conversion.names import layout
    from recurrentgemma_conversion.readers.base import Contents
    from recurrentgemma_conversion.readers.huggingface import write_huggingface

    pattern: Any = ("recurrent", "recurrent", "attention") * (LAYERS // 3)
    config = GriffinConfig(VOCABULARY, WIDTH, MLP, WIDTH // 128, pattern, True, 2048, 30.0)
    dtypes = {spec.path: DTYPES["float32"] for spec in layer_spec(config)}
    (home / SPEED).mkdir()
    with write_huggingface(home / SPEED, Contents(config, dtypes)) as write:
        stored = layout(config, Format.HUGGINGFACE)
        for name, tensor in stored.encode(lambda spec: values(spec, "float32")):
            write(name, tensor)
    convert("tiny", home / TEXT, Format.HUGGINGFACE, dtype="float32")
    tokenizer = load_tokenizer()
    texts = [file.read_text(encoding="utf-8") for file in sorted(ROOT.glob("notebooks/texts/*"))]
    ids = [[tokenizer.bos_id, *tokenizer.encode(text)][:LENGTH] for text in texts]
    np.save(home / TOKENS, np.array(ids, np.int32))


def errors(home: Path, plain: Logits, quantized: Logits) -> dict[str, Task]:
    """Tasks that give the relative error of logits, and how many more bits a byte takes, in %."""
    tokens = np.load(home / TOKENS)
    true, found = (np.asarray(run(tokens), np.float64) for run in (plain, quantized))
    error = float(np.linalg.norm(found - true) / np.linalg.norm(true))

    def surprise(logits: np.ndarray) -> float:
        logits = logits[:, :-1] - logits[:, :-1].max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, tokens[:, 1:, None].astype(np.int64), -1)[..., 0]
        return float((np.log(np.exp(logits).sum(-1)) - chosen).sum())

    more = 100 * (surprise(found) / surprise(true) - 1)
    return {ERROR: lambda: error, BITS: lambda: more}


def timed(step: Callable[[], Any]) -> Task:
    """A task that is a step's seconds."""

    def run() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return run


def ours(framework: str, form: str, home: Path) -> dict[str, Task]:
    """A twin: the engine's step, and a forward pass."""
    from recurrentgemma.common.io.checkpoint import load_tokenizer
    from recurrentgemma.common.twin import find_twin

    twin, scheme = find_twin(framework), None if form == "float32" else form

    def logits(quantize: str | None) -> Logits:
        model = twin.load(home / TEXT, "float32", quantize=quantize)
        places = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
        return lambda tokens: twin.forward(model, tokens, places).activations["logits"]

    model = twin.load(home / SPEED, "float32", quantize=scheme, decoding=1)
    engine = twin.sampler(model, load_tokenizer()).engine
    cache = engine.begin(1)

    def step() -> None:
        nonlocal cache
        out, cache = engine.feed(cache, np.ones(1, np.int32), np.full(1, 300, np.int32))
        engine.on_host(out[0, :1])

    size = float(engine.num_bytes)
    return {STEP: timed(step), SIZE: lambda: size, **errors(home, logits(None), logits(scheme))}


def torchao(form: str, home: Path) -> dict[str, Task]:
    """RecurrentGemma of transformers, with the linear layers that torchao quantises."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_grad_enabled(False)
    quantization, int4, utils = (
        importlib.import_module(f"torchao.{name}")
        for name in ("quantization", "prototype.quantization.int4", "utils")
    )
    kinds: dict[str, Callable[[], Any]] = {
        "int8": quantization.Int8WeightOnlyConfig,
        "int8, MLPs compiled": quantization.Int8WeightOnlyConfig,
        "int8 and int8 rows": quantization.Int8DynamicActivationInt8WeightConfig,
        "int4": int4.PrototypeInt4WeightOnlyConfig,
    }

    def load(name: str, quantize: bool = True) -> Any:
        model = AutoModelForCausalLM.from_pretrained(home / name, dtype=torch.float32).eval()
        if quantize and form in kinds:
            quantization.quantize_(model, kinds[form]())
        if "compiled" in form and name == SPEED:
            for layer in model.model.layers:
                layer.mlp_block.compile()
        return model

    def logits(model: Any) -> Logits:
        def run(tokens: np.ndarray) -> np.ndarray:
            rows = torch.from_numpy(tokens.astype(np.int64)).split(1)
            return np.concatenate([model(row, use_cache=False).logits.numpy() for row in rows])

        return run

    model = load(SPEED)
    cache, place = DynamicCache(config=model.config), 0

    def step() -> None:
        nonlocal place
        places = torch.full((1, 1), place)
        model(torch.ones_like(places), position_ids=places, past_key_values=cache, use_cache=True)
        place += 1

    found = errors(home, logits(load(TEXT, quantize=False)), logits(load(TEXT)))
    size = float(utils.get_model_size_in_bytes(model))
    return {STEP: timed(step), SIZE: lambda: size, **found}


def mlx(form: str, home: Path) -> dict[str, Task]:
    """RecurrentGemma of mlx-lm."""
    mx, nn, utils = (importlib.import_module(f"mlx.{name}") for name in ("core", "nn", "utils"))
    caches = importlib.import_module("mlx_lm.models.cache")
    loading = importlib.import_module("mlx_lm.utils")

    def load(name: str, quantize: bool = True) -> Any:
        model = loading.load_model(home / name)[0]
        if quantize and MLX[form]:
            group, bits = MLX[form]
            nn.quantize(model, group_size=group, bits=bits)
        mx.eval(model.parameters())
        return model

    def logits(model: Any) -> Logits:
        return lambda tokens: np.array(model(mx.array(tokens)).astype(mx.float32))

    model = load(SPEED)
    cache = caches.make_prompt_cache(model)

    def step() -> None:
        mx.eval(model(mx.array([[1]]), cache=cache))

    found = errors(home, logits(load(TEXT, quantize=False)), logits(load(TEXT)))
    size = float(sum(value.nbytes for _, value in utils.tree_flatten(model.parameters())))
    return {STEP: timed(step), SIZE: lambda: size, **found}


def stack(library: str, form: str) -> dict[str, Task]:
    """The model's matrices one after another, by qwix in Flax or by ours."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    widths = [*[WIDTH, MLP, WIDTH, MLP, *[WIDTH] * 4] * LAYERS, VOCABULARY]

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for width in widths:
                x = nn.Dense(width, use_bias=False)(
                    x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True))
                )
            return x

    rng = np.random.default_rng(0)
    matrices = [
        rng.standard_normal((i, o), np.float32) / np.float32(math.sqrt(i))
        for i, o in zip([WIDTH, *widths], widths, strict=False)
    ]
    x = rng.standard_normal((32, WIDTH), np.float32)
    params: Any = {f"Dense_{i}": {"kernel": jnp.asarray(w)} for i, w in enumerate(matrices)}
    run = jax.jit(lambda params, x: Stack().apply({"params": params}, x))
    true = np.asarray(run(params, x))
    if library == "qwix" and QWIX[form]:
        qwix = importlib.import_module("qwix")
        rule = qwix.QuantizationRule(module_path=".*", **QWIX[form])
        model = qwix.quantize_model(Stack(), qwix.PtqProvider([rule]))
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))["params"]
        params = qwix.quantize_params(params, shapes)
        run = jax.jit(lambda params, x: model.apply({"params": params}, x))
    elif library == "ours":
        from recurrentgemma.common.quantization import quantize
        from recurrentgemma.jax.products import Rows, product

        def held(w: np.ndarray) -> Any:
            if form == "float32":
                return Rows(jnp.asarray(w.T))
            return quantize(w, form).with_parts(jnp.asarray)

        params = [held(w) for w in matrices]

        def multiply(params: Any, x: Any) -> Any:
            for w in params:
                x = product(x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True)), w)
            return x

        run = jax.jit(multiply)
    error = float(np.linalg.norm(np.asarray(run(params, x)) - true) / np.linalg.norm(true))
    size = float(sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
    step = timed(lambda: run(params, x[:1]).block_until_ready())
    return {STEP: step, SIZE: lambda: size, ERROR: lambda: error}


def installed(python: str, package: str) -> str:
    """The version of a package in another interpreter's environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def contenders(arguments: argparse.Namespace) -> dict[str, str]:
    """The interpreter of each contender."""
    found = {f"{twin} {form}": sys.executable for twin in ("jax", "torch") for form in OURS}
    found |= {f"torchao {form}": arguments.torchao for form in TORCHAO}
    found |= {f"mlx {form}": arguments.mlx for form in MLX}
    found |= {f"stack-qwix {form}": arguments.qwix for form in QWIX}
    found |= {f"stack-ours {form}": sys.executable for form in STACKS if arguments.qwix}
    only = arguments.only or [*found]
    return {name: python for name, python in found.items() if python and name in only}


def tasks(contender: str, home: Path) -> dict[str, Task]:
    """What a contender's process does."""
    library, _, form = contender.partition(" ")
    if library.startswith("stack-"):
        return stack(library.removeprefix("stack-"), form)
    if library in ("torchao", "mlx"):
        return {"torchao": torchao, "mlx": mlx}[library](form, home)
    return ours(library, form, home)


def show(seconds: Seconds, versions: dict[str, str], output: Path | None) -> None:
    """Prints the table, and writes it to `output`."""
    from rich.table import Table

    steps = {name: statistics.median(found[STEP]) for name, found in seconds.items()}
    table = Table("", "GB", "a step, ms", "tokens/s", "x float32", "error", "bits a byte, %")
    for name, step in steps.items():
        plain, found = steps.get(f"{name.split()[0]} float32"), seconds[name]
        table.add_row(
            name,
            f"{found[SIZE][0] / 1e9:.3f}",
            spread(found[STEP]),
            f"{1 / step:.3g}",
            f"{plain / step:.2f}" if plain else "",
            f"{found[ERROR][0]:.2e}",
            f"{found[BITS][0]:+.3f}" if BITS in found else "",
        )
    table.caption = ", ".join(f"{name} {version}" for name, version in versions.items())
    publish(table, {"seconds": seconds, "peers": versions}, output)


def main() -> None:
    """Measures every contender."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    for library in ("torchao", "qwix", "mlx"):
        parser.add_argument(f"--{library}", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", help='contenders, such as "torchao int8"')
    parser.add_argument("--output", type=Path, help="file for the results, without a suffix")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(tasks(arguments.worker[0], Path(arguments.worker[1])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        make_folders(home)
        found, seconds = contenders(arguments), Seconds()
        libraries: dict[str, list[str]] = {}
        for name in found:
            libraries.setdefault(re.split("[- ]", name)[0], []).append(name)
        for names in libraries.values():
            workers = {}
            for name in names:
                try:
                    workers[name] = Worker([found[name], __file__, "--worker", name, scratch])
                except RuntimeError as error:
                    print(error, file=sys.stderr)
            seconds |= measure(workers, arguments.rounds)[1]
            for worker in workers.values():
                worker.close()
    versions = {
        package: installed(python, package)
        for package in ("torchao", "qwix", "mlx", "mlx-lm")
        if (python := getattr(arguments, package.partition("-")[0]))
    }
    show(seconds, versions, arguments.output)


if __name__ == "__main__":
    main()
