"""A training step against other implementations: its time, and its memory with a large vocabulary.

    python benchmarks/training.py time --published ENVIRONMENT/bin/python --output FILE
    python benchmarks/training.py memory --published ENVIRONMENT/bin/python --output FILE

"time" is a step on 2 x 512 tokens with the model of `benchmarks/model.py` (23M parameters,
float32); contenders run in turns, each in its own process. "memory" is a step on 2 x 2048 tokens
with a model of vocabulary 256,000 and width 256 (R R A). Contenders run one after the other, and
the figure is the peak memory of the process; if the machine has no room for a JAX step, the figure
is the memory that the compiler plans for it. The published package's step comes from its
fine-tuning tutorial: a one-hot cross-entropy over all logits, and Optax. `transformers` has its own
loss. A contender recomputes blocks in the backward pass only if its name says remat.

`--published` names the Python of a separate environment: see `benchmarks/model.py`; it also needs
`optax`.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from interleaved import Task, Worker, measure, publish, serve, spread
from model import SHAPE, config_of
from rich.table import Table

TIME = {"shape": (2, 512), "settings": {}}
MEMORY = {
    "shape": (2, 2048),
    "settings": {
        "vocab_size": 256_000,
        "width": 256,
        "mlp_expanded_width": 768,
        "num_heads": 4,
        "attention_window_size": 2048,
    },
}
WORKLOADS = {"time": TIME, "memory": MEMORY}
RATE, DECAY, B2 = 1e-4, 0.1, 0.96  # the tutorial's values


class Step(NamedTuple):
    """A training step.

    Attributes:
      run: Runs the step.
      planned: Bytes that the compiler plans for the step; 0 if it does not say.
    """

    run: Task
    planned: Callable[[], int] = lambda: 0


Make = Callable[[dict[str, Any], str], Step]


def config(package: Any, workload: dict[str, Any]) -> Any:
    """The workload's config; the published package and ours take the same arguments."""
    made = config_of(package, **workload["settings"])
    if workload is MEMORY:
        made = config_of(package, **workload["settings"], block_types=made.block_types[:3])
    return made


def text(workload: dict[str, Any]) -> np.ndarray:
    """Random tokens, [B, T + 1]."""
    batch, length = workload["shape"]
    vocab_size = {**SHAPE, **workload["settings"]}["vocab_size"]
    tokens = np.random.default_rng(0).integers(1, vocab_size, (batch, length + 1))
    return tokens.astype(np.int32)


def our_options(package: Any, name: str) -> Any:
    """The tutorial's optimiser."""
    if name == "sgd":
        return package.OptimizerOptions("sgd", RATE, clip_norm=None)
    return package.OptimizerOptions("adamw", RATE, DECAY, b2=B2, clip_norm=None)


def our_batch(package: Any, workload: dict[str, Any]) -> Any:
    """The workload's batch."""
    tokens = text(workload)
    positions = np.broadcast_to(np.arange(tokens.shape[1] - 1, dtype=np.int32), workload["shape"])
    weights = np.ones(workload["shape"], np.float32)
    return package.Batch(tokens[:, :-1], positions.copy(), tokens[:, 1:], weights)


def ours(framework: str, remat: bool, workload: dict[str, Any], optimizer: str) -> Step:
    """Our step."""
    import importlib

    package = importlib.import_module(f"recurrentgemma.{framework}")
    griffin_config = config(package, workload)
    model = package.Griffin(griffin_config, gradient_checkpointing=remat)
    params = (package.init_params(griffin_config, 0),) if framework == "jax" else ()
    options = our_options(package, optimizer)
    held = {"state": package.create_train_state(model, *params, optimizer=options)}
    del params
    batch = our_batch(package, workload)

    def step() -> None:
        held["state"], metrics = package.train_step(held["state"], batch)
        assert np.isfinite(float(metrics["loss"]))
        if framework == "jax":
            import jax

            jax.block_until_ready(held["state"].parameters)

    return Step(step)


def tutorial(remat: bool, scan_type: str, workload: dict[str, Any], optimizer: str) -> Step:
    """The tutorial's step, on the published package."""
    import jax
    import jax.numpy as jnp
    import optax

    from recurrentgemma import jax as package

    griffin_config = config(package, workload)
    griffin_config = griffin_config._replace(scan_type=package.ScanType[scan_type])
    model = package.Griffin(griffin_config, gradient_checkpointing=remat)
    tokens = jnp.asarray(text(workload))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def loss(params, tokens, mask, positions):
        logits, _ = model.apply({"params": params}, tokens[:, :-1], positions[:, :-1], None)
        one_hot = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1]) * mask[:, 1:, None]
        count = len(tokens) * (mask[:, 1:].sum() + 1e-8)
        return -jnp.sum(jax.nn.log_softmax(logits) * one_hot) / count

    def decays(path: Any, _: Any) -> bool:
        keys = [key.key for key in path]
        return not ("rg_lru" in keys or "embedder" in keys or keys[-1] in ("b", "scale"))

    mask = functools.partial(jax.tree_util.tree_map_with_path, decays)
    transformation = {
        "sgd": optax.sgd(RATE),
        "adamw": optax.adamw(RATE, b2=B2, weight_decay=DECAY, mask=mask),
    }[optimizer]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, tokens, positions):
        mask = jnp.ones(tokens.shape)
        value, grads = jax.value_and_grad(loss)(params, tokens, mask, positions)
        updates, state = transformation.update(grads, state, params)
        return value, optax.apply_updates(params, updates), state

    params = jax.jit(model.init)(jax.random.key(0), tokens[:, :8], positions[:, :8])["params"]
    held = {"state": (params, jax.jit(transformation.init)(params))}
    del params

    @functools.cache
    def compiled() -> Any:
        return update.lower(*held["state"], tokens, positions).compile()

    def step() -> None:
        value, *state = compiled()(*held.pop("state"), tokens, positions)
        held["state"] = jax.block_until_ready(state)
        assert np.isfinite(float(value))

    def planned() -> int:
        plan = compiled().memory_analysis()
        return plan.argument_size_in_bytes + plan.temp_size_in_bytes

    return Step(step, planned)


def torch_step(model: Any, loss: Callable[[], Any], optimizer: str) -> Step:
    """A step with torch's own optimiser."""
    import torch

    make = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), RATE),
        "adamw": lambda: torch.optim.AdamW(model.parameters(), RATE, (0.9, B2), weight_decay=DECAY),
    }[optimizer]
    stepper = make()

    def step() -> None:
        value = loss()
        value.backward()
        stepper.step()
        stepper.zero_grad()
        assert np.isfinite(float(value.detach()))

    return Step(step)


def published_torch(workload: dict[str, Any], optimizer: str) -> Step:
    """A step of the published package's PyTorch half, with torch's loss over all logits."""
    import torch

    from recurrentgemma import torch as package

    model = package.Griffin(config(package, workload), gradient_checkpointing=False)
    tokens = torch.from_numpy(text(workload)).long()
    positions = torch.arange(tokens.shape[1] - 1).expand(workload["shape"])

    def loss() -> Any:
        logits = model(tokens[:, :-1], positions, return_cache=False)[0]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return torch_step(model, loss, optimizer)


def transformers_step(workload: dict[str, Any], optimizer: str) -> Step:
    """A step of `transformers`, with its own loss."""
    import torch
    import transformers

    from recurrentgemma import torch as package

    shape = config(package, workload)
    model = transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(
            num_hidden_layers=shape.num_layers,
            vocab_size=shape.vocab_size,
            hidden_size=shape.width,
            intermediate_size=2 * shape.mlp_expanded_width,
            num_attention_heads=shape.num_heads,
            attention_window_size=shape.attention_window_size,
        )
    )
    tokens = torch.from_numpy(text(workload)).long()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def loss() -> Any:
        return model(inputs, labels=inputs, shift_labels=targets, use_cache=False).loss

    return torch_step(model, loss, optimizer)


OURS: dict[str, Make] = {
    "jax": functools.partial(ours, "jax", False),
    "jax remat": functools.partial(ours, "jax", True),
    "torch": functools.partial(ours, "torch", False),
    "torch remat": functools.partial(ours, "torch", True),
}
PEERS: dict[str, Make] = {"transformers": transformers_step}
PUBLISHED: dict[str, Make] = {
    "published tutorial, associative": functools.partial(tutorial, False, "ASSOCIATIVE_NATIVE"),
    "published tutorial": functools.partial(tutorial, True, "AUTO"),
    "published torch": published_torch,
}
EVERY = OURS | PEERS | PUBLISHED


def report_peak(step: Step) -> None:
    """Runs two steps and prints the peak memory of this process, before them and in total."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    planned, peak = step.planned(), None
    if planned < available():
        step.run()
        step.run()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"before": before, "planned": planned, "peak": peak}))


def available() -> int:
    """Bytes of memory that this machine has free."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def time_steps(commands: dict[str, list[str]], rounds: int, output: Path | None) -> None:
    """Prints medians, quartiles and the ratio of each peer to each contender of ours."""
    workers = {name: Worker(command) for name, command in commands.items()}
    first, later = measure(workers, rounds)
    for worker in workers.values():
        worker.close()
    peers = [name for name in later if name not in OURS]
    table = Table("", "step, ms", "first, s", *(f"{peer} takes" for peer in peers))
    for name, seconds in later.items():
        middle = statistics.median(seconds["step"])
        ratios = (
            f"{statistics.median(later[peer]['step']) / middle:.2f} x" if name in OURS else ""
            for peer in peers
        )
        table.add_row(name, spread(seconds["step"]), f"{first[name]['step'][0]:.1f}", *ratios)
    publish(table, {"first": first, "seconds": later}, output)


def weigh_steps(commands: dict[str, list[str]], output: Path | None) -> None:
    """Prints peaks, and the ratio of each to the tutorial's peak."""
    bytes_ = {}
    for name, command in commands.items():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name} ended with {done.returncode}: {done.stderr[-300:]}", file=sys.stderr)
            continue
        bytes_[name] = json.loads(done.stdout.splitlines()[-1])
    held = {name: each["peak"] or each["planned"] for name, each in bytes_.items()}
    theirs = held.get("published tutorial")
    table = Table("", "before, GB", "planned, GB", "peak, GB", "share of the tutorial's")
    for name, each in bytes_.items():
        sizes = (f"{(each[key] or 0) / 1e9:.2f}" for key in ("before", "planned"))
        peak = f"{each['peak'] / 1e9:.2f}" if each["peak"] else "no room"
        table.add_row(name, *sizes, peak, f"{held[name] / theirs:.2f}" if theirs else "")
    publish(table, {"bytes": bytes_}, output)


def main() -> None:
    """Measures every contender."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("what", choices=WORKLOADS)
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--published", metavar="PYTHON", help="Python with the published package")
    parser.add_argument("--only", nargs="+", help="contenders, by name")
    parser.add_argument("--output", type=Path, help="file for the results, without a suffix")
    parser.add_argument("--worker", choices=EVERY, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        step = EVERY[arguments.worker](WORKLOADS[arguments.what], arguments.optimizer)
        if arguments.what == "time":
            serve({"step": step.run})
        else:
            report_peak(step)
        return
    pythons: dict[str, str] = dict.fromkeys(OURS | PEERS, sys.executable)
    if arguments.published:
        pythons |= dict.fromkeys(PUBLISHED, str(arguments.published))
    common = [arguments.what, "--optimizer", arguments.optimizer]
    commands = {
        name: [python, __file__, *common, "--worker", name]
        for name, python in pythons.items()
        if not arguments.only or name in arguments.only
    }
    if arguments.what == "time":
        time_steps(commands, arguments.rounds, arguments.output)
    else:
        weigh_steps(commands, arguments.output)


if __name__ == "__main__":
    main()
