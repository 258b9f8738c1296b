"""Conversations as JSON: a list of messages with roles, as `transformers` and servers take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.tokenizer import END_OF_TURN, Tokenizer, with_system


class Message(NamedTuple):
    """What one side says.

    Attributes:
      role: "user" or "model".
      content: The words.
    """

    role: str
    content: str


def read_messages(value: Any, *, answered: bool) -> list[Message]:
    """The turns of user and model, one after the other, the user first.

    Args:
      value: A list of objects with a "role" and a "content"; "assistant" also means "model". A
        first message of the role "system" is put before the user's first words, with an empty line
        between, as in the template of Gemma 3; earlier models were trained without one.
      answered: Whether the last turn is the model's; it must be the user's if not.

    Raises:
      ValueError: It is no such list.
    """
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UserError("'messages' must be a list of objects")
    roles = ["model" if turn.get("role") == "assistant" else turn.get("role") for turn in value]
    system = roles[:1] == ["system"]
    spoken = roles[system:]
    expected = ["user", "model"] * (len(spoken) // 2) + ["user"] * (not answered)
    if not spoken or spoken != expected:
        last = "model" if answered else "user"
        raise UserError(
            f"the roles must be user, model, user, model, ..., the last {last}, perhaps after "
            f"system, got {roles}"
        )
    contents = [turn.get("content") for turn in value]
    for content in contents:
        if not isinstance(content, str):
            raise UserError(f"'content' must be a string, got {type(content).__name__}")
    if system:
        contents[:2] = [with_system(*contents[:2])]
    return [Message(role, content) for role, content in zip(spoken, contents, strict=True)]


def encode_messages(
    messages: Sequence[Message], tokenizer: Tokenizer, *, allow_control_tokens: bool = False
) -> Iterator[tuple[list[int], bool]]:
    """The tokens of each message in the chat template, from BOS on.

    Yields:
      The tokens, and whether the model says them. A user's turn goes up to the model's words, and
      a model's turn ends with `<end_of_turn>`.

    Raises:
      ValueError: The tokenizer has no `<end_of_turn>`.
    """
    if tokenizer.end_of_turn_id is None:
        raise UserError(f"the tokenizer has no {END_OF_TURN}, which messages need")
    for number, (role, content) in enumerate(messages):
        if role == "model":
            answer = tokenizer.encode(content, allow_control_tokens=allow_control_tokens)[1:]
            yield [*answer, tokenizer.end_of_turn_id], True
            continue
        bos, before = ([], "\n") if number else ([tokenizer.bos_id], "")
        asked = tokenizer.encode_turn(content, before, allow_control_tokens=allow_control_tokens)
        yield [*bos, *asked], False
