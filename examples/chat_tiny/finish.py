"""Makes the bundled chat model from a run: casts to bfloat16, measures, and writes the card.

python examples/chat_tiny/finish.py runs/chat_tiny/run --force
python examples/chat_tiny/finish.py runs/chat_tiny/run --out somewhere/else
"""

import argparse
import json
import sys
import tomllib
from pathlib import Path

import torch
from card import model_card
from measure import FREE, answers, shares
from rich.console import Console
from tables import HERE, read_file

from recurrentgemma.common.io.checkpoint import BUNDLED_CHAT
from recurrentgemma.common.io.files import whole_file
from recurrentgemma.common.training.logs import read_log
from recurrentgemma.common.training.run_folder import RunFolder
from recurrentgemma.torch import Sampler, load_checkpoint, load_tokenizer
from recurrentgemma_conversion import convert

TARGET = 0.8  # of the answers to questions in words held out, for a model to be bundled

console = Console(stderr=True)


def finish(arguments: argparse.Namespace) -> float:
    """Writes `--out`; returns the share of right answers to questions in words held out."""
    run, out = RunFolder(arguments.run), arguments.out
    if not run.model.is_dir():
        raise ValueError(f"{run.path} holds no finished run")
    if out.exists() and not arguments.force:
        raise ValueError(f"{out} exists: pass --force to replace it, or another --out")
    lines = arguments.held_out.read_text(encoding="utf-8").splitlines()
    tests = [json.loads(line) for line in lines]
    convert(run.model, out, "recurrentgemma", dtype="bfloat16", force=arguments.force)
    model = load_checkpoint(out, dtype=torch.float32)
    sampler = Sampler(model, load_tokenizer(out), is_it_model=True)
    free = [
        {
            "about": FREE,
            "key": row["key"],
            "messages": [{"role": "user", "content": row["question"]}],
        }
        for row in read_file(HERE / "questions.toml")["free"].rows
    ]
    said = answers(sampler, [test["messages"] for test in [*tests, *free]])
    counts, free_said = shares(tests, said[: len(tests)]), said[len(tests) :]
    free_count = shares(free, free_said)[FREE]
    options = tomllib.loads(run.options.read_text(encoding="utf-8"))
    examples = [
        (test["messages"][0]["content"], answer.text)
        for test, answer in zip(free, free_said, strict=True)
    ]
    card = model_card(options, read_log(run.train_log), counts, free_count, examples)
    with whole_file(out / "README.md", force=True) as temporary:
        temporary.write_text(card, encoding="utf-8")
    if arguments.answers:
        for test, answer in zip([*tests, *free], said, strict=True):
            right = answer.ended and test["key"] in answer.text
            print(json.dumps(test | {"said": answer.text, "right": right}, ensure_ascii=False))
    for about, count in (counts | {FREE: free_count}).items():
        console.print(f"{about}: {count.right} of {count.asked} right, {count.exact} exact, "
                      f"{count.ended} ended")  # fmt: skip
    return counts["All"].right / counts["All"].asked


def main() -> int:
    """Returns 0 for a model good enough to bundle, 1 for a worse one, 2 for an error."""
    parser = argparse.ArgumentParser(description="Make the bundled chat model from a run.")
    parser.add_argument("run", type=Path, help="the folder of the run")
    parser.add_argument("--out", type=Path, default=BUNDLED_CHAT, help="folder of the model")
    parser.add_argument("--force", action="store_true", help="replace the model in --out")
    parser.add_argument("--answers", action="store_true", help="print each answer as JSON")
    parser.add_argument("--held-out", type=Path, default=Path("runs/chat_tiny/held_out.jsonl"))
    try:
        share = finish(parser.parse_args())
    except (OSError, ValueError) as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 2
    if share < TARGET:
        console.print(f"[red]{share:.1%} right is below {TARGET:.0%}: train longer")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
