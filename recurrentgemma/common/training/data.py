"""Training examples from JSON lines: texts, prompts with completions, conversations."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.io.files import expanded
from recurrentgemma.common.io.jsonl import json_value
from recurrentgemma.common.io.text import as_utf8
from recurrentgemma.common.messages import encode_messages, read_messages
from recurrentgemma.common.tokenizer import Tokenizer, apply_it_formatter, with_system

_KINDS = {"text": ("text",), "prompt": ("prompt", "completion"), "messages": ("messages",)}
_EXPECTED = 'an object with "text", with "prompt" and "completion", or with "messages"'
_SHOWN = 5
_OPENING = 32  # characters


class DataError(UserError):
    """A model cannot train on this data; the message names the file and the lines."""


class Example(NamedTuple):
    """A document to learn from.

    Attributes:
      tokens: Its token ids, [N].
      counts: Which tokens the model learns to predict; never the first.
      prompt: A prompt that asks a model for a similar document.
    """

    tokens: Int[np.ndarray, " n"]
    counts: Bool[np.ndarray, " n"]
    prompt: str = ""

    @property
    def places(self) -> int:
        """How many tokens the model reads: all but the last."""
        return len(self.tokens) - 1


def read_examples(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    eos: bool = True,
    allow_control_tokens: bool = False,
) -> list[Example]:
    """The examples of a file, one on each line; empty lines are skipped, and gzip is read.

    - `{"text": ...}`: BOS, the text, EOS. All but BOS counts.
    - `{"prompt": ..., "completion": ...}`: BOS, the prompt, the completion, EOS. Tokens after the
      prompt count; the prompt is tokenized on its own.
    - `{"messages": [{"role": "user", "content": ...}, {"role": "model", ...}, ...]}`: turns in the
      template of instruction-tuned models, as `read_messages` takes them. The model's turns count,
      each with its `<end_of_turn>`; the last one ends the example. What the words of a message
      spell is text, `<end_of_turn>` too.

    Args:
      path: The file.
      tokenizer: The model's tokenizer: a `Tokenizer`, or what it takes.
      eos: Whether EOS ends texts and completions.
      allow_control_tokens: Whether `<end_of_turn>` and the like, spelled in a message, are tokens.

    Raises:
      DataError: There are no examples, or some lines hold none; the message has the first few.
      OSError: The file cannot be read.
    """
    path, tokenizer = expanded(path), Tokenizer(tokenizer)
    examples, problems = [], []
    with path.open("rb") as file:
        for number, data in enumerate(as_utf8(file, str(path)), 1):
            try:
                if data.strip():
                    examples.append(
                        _example(json_value(data), tokenizer, eos, allow_control_tokens)
                    )
            except ValueError as error:
                problems.append(f"line {number}: {error}")
    if problems:
        shown = "\n  ".join(problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(f"{path}, {shown}{more}")
    if not examples:
        raise DataError(f"{path} holds no examples")
    return examples


def _example(value: Any, tokenizer: Tokenizer, eos: bool, allowed: bool) -> Example:
    kinds = [kind for kind in _KINDS if isinstance(value, dict) and kind in value]
    if len(kinds) != 1:
        raise UserError(f"{_EXPECTED} is expected")
    if kinds == ["messages"]:
        messages = read_messages(value["messages"], answered=True)
        turns = list(encode_messages(messages, tokenizer, allow_control_tokens=allowed))
        _, words, system = messages[0]
        return _joined(turns, apply_it_formatter(with_system(system, words.strip())))
    *before, last = (_string(value, name) for name in _KINDS[kinds[0]])
    if not last:
        raise UserError(f"{_KINDS[kinds[0]][-1]!r} is empty")
    prompt = "".join(before)
    end = [tokenizer.eos_id] if eos else []
    parts = [(tokenizer.encode(prompt), False), (tokenizer.encode(last)[1:] + end, True)]
    return _joined(parts, prompt if before else _opening(last))


def _string(value: Mapping[str, Any], name: str) -> str:
    text = value.get(name)
    if not isinstance(text, str):
        raise UserError(f"{name!r} must be a string, got {type(text).__name__}")
    return text


def _joined(parts: Sequence[tuple[list[int], bool]], prompt: str) -> Example:
    tokens = np.array([token for tokens, _ in parts for token in tokens], np.int32)
    counts = np.repeat([counts for _, counts in parts], [len(tokens) for tokens, _ in parts])
    return Example(tokens, counts, prompt)


def _opening(text: str) -> str:
    """The first words of a text."""
    return text[:_OPENING].rpartition(" ")[0] or text[:_OPENING]


def hold_out(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and a share, at least one example, to validate with.

    Raises:
      DataError: No example would be left to train on.
    """
    count = max(1, round(share * len(examples)))
    if count >= len(examples):
        raise DataError(
            f"{count} of {len(examples)} examples are to be held out: none are left to train on"
        )
    chosen = set(np.random.default_rng([seed, 1]).permutation(len(examples))[:count].tolist())
    held_out = [example for i, example in enumerate(examples) if i in chosen]
    return [example for i, example in enumerate(examples) if i not in chosen], held_out


def fingerprint(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
