"""The chat model's card, filled in with the measurements."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from measure import Share
from tables import HERE, read_file

SHOWN = 24  # free questions

CARD = """\
# The bundled tiny Griffin that chats

The [bundled tiny Griffin](../tiny/README.md), fine-tuned to answer simple questions about its two
sources, the World English Bible and Jane Austen's six novels, in Gemma's chat template. It ends
each answer with `<end_of_turn>`. It is here so that `recurrentgemma chat`, chat templates, system
texts and fine-tuning with messages have a model to run on, in both frameworks, without a download.
It is a demonstration: it has learnt a list of facts and some ways to ask for them.

```sh
recurrentgemma chat
recurrentgemma sample --chat "Who is Mr. Darcy?"
```

Its config, vocabulary, size and licence are the same as the [base model](../tiny/README.md)'s; the
weights are bfloat16, 10.7 MB.

## Data

`examples/chat_tiny` makes the data: {tokens:,} tokens of conversations, some of several turns, some
with a system text. This project wrote the facts, the questions and the answers as tables:
{austen_people} persons, {places} houses and {couples} couples of the novels; {bible_people}
persons, {deeds} deeds and {verses} verses of the Bible; small talk; names that the user or a system
text gives; and questions beyond the corpus, which the model is to decline. The verses and the first
sentences of the novels are quoted from the corpus, and so are paragraphs that answer "Write like
Jane Austen." and the like. The corpus is public domain.

## Recipe

```sh
python examples/chat_tiny/make_data.py
recurrentgemma train --options examples/chat_tiny/options.toml --out runs/chat_tiny/run
python examples/chat_tiny/finish.py runs/chat_tiny/run
```

{steps:,} steps of {batch} x {length} tokens, one pass, in {framework} on a CPU ({machine}). AdamW,
weight decay {weight_decay:g}, learning rate {learning_rate:g} with a warm-up over {warmup_steps}
steps and then by half a cosine to {final_fraction:g} of it, gradient norm clipped at {clip_norm:g},
{dtype}, seed {seed}. Only the model's turns count in the loss.

## Measured

The answers are greedy; the weights are as stored, in bfloat16, and arithmetic is in float32. The
questions are about facts that the model has seen, each in a wording that no training example has.
The names told, the strangers and the subjects beyond its reading are held out too. An answer is
right if it contains the expected words and ends with `<end_of_turn>`. The column "exact" counts
answers that are the expected ones word for word, and "ended" those that end with `<end_of_turn>`.

| questions | asked | right | | exact | ended |
|---|---|---|---|---|---|
{rows}

The free questions were written before the model was trained, as a reader might ask them, in no
fixed wording: **{free_right} of {free_asked} answers are right** ({free_share:.0%}). So the model
depends on wordings near those that it has seen.

## Samples

The answers to the first {shown} free questions, right or wrong.

| question | answer |
|---|---|
{samples}

## Limits

- It knows only what its tables say. Asked in another way, or about anything else, it often gives a
  wrong answer in the same sure voice. It declines what is far from its corpus, but not always.
- It does not reason, count or compare. It follows no instruction but to be brief.
- It repeats names that training had; a name that is new to it, it replaces by one of those.
- It half remembers verses: do not take its quotations for the text.
- It speaks in the voice of its sources, with their views of women, servants, strangers and war.
"""


def model_card(
    options: dict[str, Any],
    log: Sequence[Mapping[str, Any]],
    counts: Mapping[str, Share],
    free: Share,
    examples: Sequence[tuple[str, str]],
) -> str:
    """The card's Markdown.

    Args:
      options: The options of the run (`run.toml`).
      log: The run's `train_log.jsonl`.
      counts: The counts by what the questions are about, and "All".
      free: The counts of the free questions.
      examples: The free questions with the model's answers.
    """
    rows = [
        f"| {about} | {n.asked} | {n.right} | {n.right / n.asked:.0%} | {n.exact} | {n.ended} |"
        for about, n in counts.items()
    ]
    cells = [
        (question.replace("|", "\\|"), " ".join(answer.split()).replace("|", "\\|"))
        for question, answer in examples[:SHOWN]
    ]
    austen, bible = (read_file(HERE / f"{name}.toml") for name in ("austen", "bible"))
    values = {
        "framework": {"jax": "JAX", "torch": "PyTorch"}[options["framework"]],
        "tokens": sum(entry["read"] for entry in log),
        "austen_people": len(austen["people"].rows),
        "places": len(austen["places"].rows),
        "couples": len(austen["couples"].rows),
        "bible_people": len(bible["people"].rows),
        "deeds": len(bible["deeds"].rows),
        "verses": len(bible["verses"].rows),
        "steps": log[-1]["step"],
        "batch": options["batch_size"] * options["accumulation"],
        "machine": platform.machine(),
        "rows": "\n".join(rows),
        "free_asked": free.asked,
        "free_right": free.right,
        "free_share": free.right / free.asked,
        "shown": min(SHOWN, len(examples)),
        "samples": "\n".join(f"| {question} | {answer} |" for question, answer in cells),
    }
    return CARD.format_map(options | values)
