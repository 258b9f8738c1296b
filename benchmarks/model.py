"""Whole-model speed: prefill, decode and a training step against other implementations.

    python benchmarks/model.py --output benchmarks/results/NAME
    python benchmarks/model.py --published ENVIRONMENT/bin/python

The workload has 23M parameters in float32 (width 512, R R A twice, window 256, vocabulary 8192):
1024 tokens of prefill, 64 tokens decoded after it one by one, 8192 tokens of prefill, and a
training step on 2 x 512 tokens with plain SGD. Contenders run in turns, each in its own process.
`--published` names the Python of a separate environment with the package `recurrentgemma` 1.0.1,
which shares our import name:

    pip install torch jax flax orbax-checkpoint sentencepiece einops jaxtyping "typeguard<3" rich
    pip install --no-deps recurrentgemma==1.0.1

`--before` names another checkout of this repository, whose code runs in the same turns.

"forward" computes the logits of every token. "prefill" computes only what sampling needs, the last
token's logits and the state, and reads long prompts in chunks of 2048 tokens, if the contender can.
"jax" decodes like its sampler, which also chooses the tokens: in bursts where a model is small.
"torch" decodes like the commands' sampler: on some CPUs with matrices in another layout. "step
compiled" decodes like torch's sampler with `jit_compile`. The training step recomputes
nothing in the backward pass unless the contender's name says remat. The bound for decoding is the
time that it takes to read the bytes of the weights.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import Task, Worker, measure, publish, serve, spread

SHAPE = {
    "vocab_size": 8192,
    "width": 512,
    "mlp_expanded_width": 1536,
    "num_heads": 8,
    "attention_window_size": 256,
    "logits_soft_cap": 30.0,
    "embeddings_scale_by_sqrt_dim": True,
}
PATTERN = ("RECURRENT", "RECURRENT", "ATTENTION") * 2
PROMPT, LONG_PROMPT, TRAIN = (1, 1024), (1, 8192), (2, 512)
CHUNK = 2048
DECODED = 64
TASKS = ("forward", "prefill", "long prefill", "decode", "train")
RATE = 1e-3
Tasks = dict[str, Task]


def batch(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and their positions, [B, T]."""
    tokens = np.random.default_rng(0).integers(SHAPE["vocab_size"], size=shape, dtype=np.int32)
    return tokens, np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()


def config_of(package: Any, **settings: Any) -> Any:
    """The workload's config; the published package and ours take the same arguments."""
    kinds = tuple(package.TemporalBlockType[kind] for kind in PATTERN)
    return package.GriffinConfig(**{**SHAPE, "block_types": kinds, **settings})


def griffin_jax(remat: bool, scan_type: str, ours: bool) -> Tasks:
    """Tasks of `recurrentgemma.jax`, ours or the published one."""
    import jax
    import jax.numpy as jnp

    from recurrentgemma import jax as package

    config = config_of(package, scan_type=package.ScanType[scan_type])
    model = package.Griffin(config, gradient_checkpointing=remat)
    tokens, positions = map(jnp.asarray, batch(PROMPT))
    params = jax.jit(model.init)(jax.random.key(0), tokens[:, :8], positions[:, :8])["params"]

    def apply(params, tokens, positions, cache=None, **settings):
        return model.apply({"params": params}, tokens, positions, cache, **settings)

    forward = jax.jit(functools.partial(apply, return_cache=False))
    prefill = jax.jit(functools.partial(apply, last_logits_only=True) if ours else apply)
    feed = jax.jit(lambda params, cache, tokens, positions: apply(
        params, tokens[:, None], positions[:, None], cache), donate_argnums=1)  # fmt: skip

    def loss(params, tokens, positions):
        logits = apply(params, tokens, positions, return_cache=False)[0][:, :-1]
        is_next = tokens[:, 1:, None] == jnp.arange(logits.shape[-1])
        picked = jnp.where(is_next, logits, 0).sum(-1)
        return (jax.nn.logsumexp(logits, -1) - picked).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(params, tokens, positions):
        value, grads = jax.value_and_grad(loss)(params, tokens, positions)
        return value, jax.tree.map(lambda p, g: p - RATE * g, params, grads)

    @functools.partial(jax.jit, donate_argnums=3)
    def read(params, tokens, positions, cache):
        return apply(params, tokens, positions, cache, return_logits=False)[1]

    long_prompt = tuple(map(jnp.asarray, batch(LONG_PROMPT)))

    def long_prefill():
        if not ours:
            return jax.block_until_ready(prefill(params, *long_prompt))
        cache = model.init_cache(1)
        *chunks, last = range(0, LONG_PROMPT[1], CHUNK)
        for start in chunks:
            cache = read(params, *(z[:, start : start + CHUNK] for z in long_prompt), cache)
        return jax.block_until_ready(prefill(params, *(z[:, last:] for z in long_prompt), cache))

    state = {
        "params": jax.tree.map(jnp.copy, params),
        "cache": prefill(params, tokens, positions)[1],
        "position": PROMPT[1] - 1,
    }
    train_tokens, train_positions = map(jnp.asarray, batch(TRAIN))
    token = np.ones(1, np.int32)

    def decode_task():
        for _ in range(DECODED):
            state["position"] += 1
            position = np.full(1, state["position"], np.int32)
            logits, state["cache"] = feed(params, state["cache"], token, position)
            jax.block_until_ready(logits)

    def as_the_sampler_does():
        size = engine.long_burst
        for _ in range(DECODED // size):
            position = np.full(1, state["position"] + 1, np.int32)
            left, numbers = np.full(1, DECODED, np.int32), np.ones((size, 1), np.float32)
            inputs = state["cache"], None, token, position, left, numbers
            sampled, state["cache"], _ = engine.decode(variant, settings, *inputs)
            state["position"] += size
            jax.block_until_ready(sampled)

    if ours:
        from recurrentgemma.common.generation.requests import RowRequest
        from recurrentgemma.common.generation.settings import row_settings, variant_of
        from recurrentgemma.common.generation.stops import Stops
        from recurrentgemma.common.generation.strategies import Greedy
        from recurrentgemma.jax.engine import ModelEngine

        engine, rows = ModelEngine(model, params), [RowRequest(DECODED, Greedy(), Stops({}, ()))]
        variant = variant_of(rows, config.vocab_size, None, False)
        settings = engine.on_device(row_settings(rows, config.vocab_size))

    def train_task():
        value, state["params"] = step(state["params"], train_tokens, train_positions)
        jax.block_until_ready((value, state["params"]))

    return {
        "forward": lambda: jax.block_until_ready(forward(params, tokens, positions)),
        "prefill": lambda: jax.block_until_ready(prefill(params, tokens, positions)),
        "long prefill": long_prefill,
        "decode": as_the_sampler_does if ours else decode_task,
        "train": train_task,
    }


def torch_tasks(
    model: Any,
    forward: Callable[[Any], Any],
    prefill: Callable[[Any], tuple[Any, Any]],
    decode: Callable[[Any, Any, int], Any],
    long_prefill: Callable[[Any], Any] | None = None,
) -> Tasks:
    """Tasks of a torch module.

    `forward(tokens)` returns logits, `prefill(tokens)` also the state, and
    `decode(token, state, position)` the next state; `long_prefill` is `prefill` if not given.
    """
    import torch

    tokens, long_prompt, train_tokens = (
        torch.from_numpy(batch(shape)[0]).long() for shape in (PROMPT, LONG_PROMPT, TRAIN)
    )
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    with torch.no_grad():
        state = {"cache": prefill(tokens)[1], "position": PROMPT[1] - 1}

    def decode_task():
        for _ in range(DECODED):
            state["position"] += 1
            state["cache"] = decode(tokens[:, :1], state["cache"], state["position"])

    def train_task():
        logits = forward(train_tokens)[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, train_tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {
        "forward": torch.no_grad()(lambda: forward(tokens)),
        "prefill": torch.no_grad()(lambda: prefill(tokens)),
        "long prefill": torch.no_grad()(lambda: (long_prefill or prefill)(long_prompt)),
        "decode": torch.no_grad()(decode_task),
        "train": train_task,
    }


def griffin_torch(remat: bool, ours: bool, compiled: bool = False) -> Tasks:
    """Tasks of `recurrentgemma.torch`, ours or the published one."""
    import torch

    from recurrentgemma import torch as package

    model = package.Griffin(config_of(package), gradient_checkpointing=remat)
    last = {"last_logits_only": True} if ours else {}

    def positions(tokens, start=0):
        return torch.arange(start, start + tokens.shape[1]).expand(tokens.shape)

    def in_chunks(tokens):
        cache = model.init_cache(1)
        *chunks, end = tokens.split(CHUNK, 1)
        for i, chunk in enumerate(chunks):
            cache = model(chunk, positions(chunk, i * CHUNK), cache, return_logits=False)[1]
        return model(end, positions(end, len(chunks) * CHUNK), cache, **last)

    def step(token, cache, position):
        return model(token, torch.full((1, 1), position), cache)[1]

    def as_the_sampler_does(token, cache, position):
        return engine.feed(cache, token[0], torch.full((1,), position))[1]

    if ours:
        from recurrentgemma.torch.quantization import pack_matrices

        decoder = copy.deepcopy(model)
        pack_matrices(decoder, 1)
        engine = package.Sampler(decoder, package.load_tokenizer(), jit_compile=compiled).engine
    return torch_tasks(
        model,
        lambda tokens: model(tokens, positions(tokens), return_cache=False)[0],
        lambda tokens: model(tokens, positions(tokens), **last),
        as_the_sampler_does if ours else step,
        in_chunks if ours else None,
    )


def transformers_torch() -> Tasks:
    """Tasks of `transformers`."""
    import torch
    import transformers

    model = transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(
            num_hidden_layers=len(PATTERN),
            vocab_size=SHAPE["vocab_size"],
            hidden_size=SHAPE["width"],
            intermediate_size=2 * SHAPE["mlp_expanded_width"],
            num_attention_heads=SHAPE["num_heads"],
            attention_window_size=SHAPE["attention_window_size"],
        )
    )

    def run(tokens, position=0, **settings):
        places = torch.arange(position, position + tokens.shape[1])
        return model(tokens, position_ids=places[None], **settings)

    return torch_tasks(
        model,
        lambda tokens: run(tokens, use_cache=False).logits,
        lambda tokens: (run(tokens, use_cache=True, logits_to_keep=1), None),
        lambda token, _, position: run(token, position, use_cache=True) and None,
    )


def memory() -> Tasks:
    """The least time that decoding can take."""
    import torch

    from recurrentgemma import torch as package

    model = package.Griffin(config_of(package), device="meta")
    weights = torch.ones(sum(parameter.numel() for parameter in model.parameters()))
    return {"decode": lambda: [torch.dot(weights, weights) for _ in range(DECODED)]}


OURS: dict[str, Callable[[], Tasks]] = {
    "jax": lambda: griffin_jax(False, "AUTO", True),
    "jax remat": lambda: griffin_jax(True, "AUTO", True),
    "torch": lambda: griffin_torch(False, True),
    "torch remat": lambda: griffin_torch(True, True),
    "torch, step compiled": lambda: griffin_torch(False, True, True),
}
PEERS: dict[str, Callable[[], Tasks]] = {"transformers": transformers_torch}
PUBLISHED: dict[str, Callable[[], Tasks]] = {
    "published jax": lambda: griffin_jax(False, "ASSOCIATIVE_NATIVE", False),
    "published jax linear remat": lambda: griffin_jax(True, "AUTO", False),
    "published torch": lambda: griffin_torch(False, False),
}
BOUND: dict[str, Callable[[], Tasks]] = {"bound": memory}
BEFORE = ", before"  # after the name of a contender from another checkout
EVERY = OURS | PEERS | PUBLISHED | BOUND


def main() -> None:
    """Measures every contender and prints medians, quartiles and ratios to the fastest peer."""
    from rich.table import Table

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--published", metavar="PYTHON", help="Python with the published package")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another checkout of ours")
    parser.add_argument("--only", nargs="+", help="contenders, by name")
    parser.add_argument("--output", type=Path, help="file for the results, without a suffix")
    parser.add_argument("--worker", choices=EVERY, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(EVERY[arguments.worker]())
        return
    here, before = Path(__file__).resolve(), arguments.before
    # The Python, the script and the variables of each contender.
    contenders: dict[str, tuple[str, Path, dict[str, str]]] = dict.fromkeys(
        OURS | PEERS | BOUND, (sys.executable, here, {})
    )
    if arguments.published:
        contenders |= dict.fromkeys(PUBLISHED, (arguments.published, here, {}))
    if before:
        old = before / "benchmarks/model.py", {"PYTHONPATH": f"{before}:{before}/conversion"}
        contenders |= {f"{name}{BEFORE}": (sys.executable, *old) for name in OURS}
    workers = {
        name: Worker([python, str(script), "--worker", name.removesuffix(BEFORE)], **variables)
        for name, (python, script, variables) in contenders.items()
        if not arguments.only or name.removesuffix(BEFORE) in arguments.only or name in BOUND
    }
    first, later = measure(workers, arguments.rounds)
    for tasks in (*first.values(), *later.values()):
        tasks["decode"] = [seconds / DECODED for seconds in tasks["decode"]]
    peaks = {name: worker.peak_bytes for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    table = Table("", *(f"{task}, ms" for task in TASKS), "first forward / train, s", "peak GB")
    (bound,) = (statistics.median(later.pop(name)["decode"]) for name in BOUND)
    for name, seconds in later.items():
        calls = " / ".join(f"{first[name][task][0]:.1f}" for task in ("forward", "train"))
        cells = (spread(seconds[task]) for task in TASKS)
        table.add_row(name, *cells, calls, f"{peaks[name] / 1e9:.2f}")
    table.add_section()
    peers = [name for name in later if name in PEERS | PUBLISHED]
    if peers:
        fastest = {task: min(statistics.median(later[p][task]) for p in peers) for task in TASKS}
        for name in later.keys() - peers:
            ratios = (f"{fastest[t] / statistics.median(later[name][t]):.2f} x" for t in TASKS)
            table.add_row(f"{name} against the fastest peer", *ratios, "", "")
    shares = {n: f"{bound / statistics.median(s['decode']):.0%}" for n, s in later.items()}
    for name, share in shares.items():
        table.add_row(f"{name}, of the bound", "", "", "", share, "", "", "")
    results = {"first": first, "seconds": later, "bound": bound, "peak_bytes": peaks}
    publish(table, results, arguments.output)


if __name__ == "__main__":
    main()
