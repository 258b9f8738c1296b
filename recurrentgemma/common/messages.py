"""Conversations as JSON: a list of messages with roles, as `transformers` and servers take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.tokenizer import END_OF_TURN, Tokenizer


class Message(NamedTuple):
    """What one side says.

    Attributes:
      role: "user" or "model".
      content: The words.
      system: What the model is told before them.
    """

    role: str
    content: str
    system: str = ""


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
    told = contents.pop(0) if system else ""
    messages = [Message(role, content) for role, content in zip(spoken, contents, strict=True)]
    return [messages[0]._replace(system=told), *messages[1:]]


def encode_messages(
    messages: Sequence[Message], tokenizer: Tokenizer, *, allow_control_tokens: bool = False
) -> Iterator[tuple[list[int], bool]]:
    """The tokens of each message in the chat template, from BOS on.

    White space around the words of a message is left out, as in the template of each family.

    Yields:
      The tokens, and whether the model says them. A user's turn goes up to the model's words, and
      a model's turn ends with `<end_of_turn>`.

    Raises:
      ValueError: The tokenizer has no `<end_of_turn>`.
    """
    if tokenizer.end_of_turn_id is None:
        raise UserError(f"the tokenizer has no {END_OF_TURN}, which messages need")
    allowed = {"allow_control_tokens": allow_control_tokens}
    for number, (role, content, system) in enumerate(messages):
        if role == "model":
            answer = tokenizer.encode(content.strip(), **allowed)[1:]
            yield [*answer, tokenizer.end_of_turn_id], True
            continue
        bos, before = ([], "\n") if number else ([tokenizer.bos_id], "")
        yield [*bos, *tokenizer.encode_turn(content, before, system, **allowed)], False
