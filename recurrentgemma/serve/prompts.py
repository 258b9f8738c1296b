"""What clients send as prompts and messages, as tokens from BOS on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from recurrentgemma.common.messages import Message, encode_messages
from recurrentgemma.common.tokenizer import Tokenizer, check_text, with_system
from recurrentgemma.serve.protocol import ChatMessage, shown
from recurrentgemma.serve.refusals import Refusal

_SYSTEM = ("system", "developer")
_ROLES = {"user": "user", "assistant": "model", "model": "model"}
_KEPT_TURNS = 2  # places before the end of a chat at which its state is kept


class PromptTokens(NamedTuple):
    """A prompt as the model reads it.

    Attributes:
      tokens: Its tokens, from BOS on.
      marks: How many tokens have been read at the places where the state is worth keeping.
      own_bos: Whether the client sent BOS itself.
    """

    tokens: tuple[int, ...]
    marks: tuple[int, ...]
    own_bos: bool = False


def read_prompts(value: Any, tokenizer: Tokenizer, vocab_size: int) -> list[PromptTokens]:
    """The prompts of a completion: a text, texts, the ids of one text, or of several.

    Raises:
      Refusal: It is nothing of that.
    """
    several = isinstance(value, list) and not (value and _is_id(value[0]))
    prompts = value if several else [value]
    if not prompts or prompts == [None]:
        raise Refusal("prompt must have a text or token ids, got none", param="prompt")
    return [_read_prompt(prompt, tokenizer, vocab_size) for prompt in prompts]


def _read_prompt(value: Any, tokenizer: Tokenizer, vocab_size: int) -> PromptTokens:
    own_bos = False
    if isinstance(value, str):
        tokens = tokenizer.encode(_text(value, "prompt"))
    elif isinstance(value, list) and all(map(_is_id, value)):
        outside = [token for token in value if not 0 <= token < vocab_size]
        if outside:
            rule = f"prompt must have token ids from 0 to {vocab_size - 1}"
            raise Refusal(f"{rule}, got {shown(outside[0])}", param="prompt")
        own_bos = value[:1] == [tokenizer.bos_id]
        tokens = value if own_bos else [tokenizer.bos_id, *value]
    else:
        wrong = value
        if isinstance(value, list):  # of ids and something else
            wrong = next(item for item in value if not _is_id(item))
        raise Refusal(
            f"prompt must be a string, token ids, or a list of one of them, got {shown(wrong)}",
            param="prompt",
        )
    return PromptTokens(tuple(tokens), (len(tokens) - 1,), own_bos)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(value: str, name: str) -> str:
    try:
        check_text(value, name)
    except ValueError as error:
        raise Refusal(str(error), param=name) from None
    return value


def read_chat(
    messages: Sequence[ChatMessage] | None, tokenizer: Tokenizer, *, strict_roles: bool = False
) -> PromptTokens:
    """The tokens of a chat in the template, up to the model's words.

    What the system and the developer say is put before the user's first words: the template has no
    place of its own for it. Equal roles in a row are joined. Control tokens that a text spells stay
    text.

    Args:
      messages: What was said so far, the user last.
      tokenizer: The model's tokenizer.
      strict_roles: Whether to refuse what the template has no place for.

    Raises:
      Refusal: The messages are no such chat.
    """
    if tokenizer.end_of_turn_id is None:
        raise Refusal("the model was not tuned to chat: use /v1/completions", param="messages")
    if not messages:
        raise Refusal("messages must have a message, got none", param="messages")
    said = [_words(message, f"messages[{i}]") for i, message in enumerate(messages)]
    pairs = [(message.role, words) for message, words in zip(messages, said, strict=True)]
    turns = []
    spoken = [(_ROLES[role], words) for role, words in pairs if role not in _SYSTEM]
    for role, group in itertools.groupby(spoken, key=lambda turn: turn[0]):
        turns.append(Message(role, "\n\n".join(words for _, words in group)))
    told = [words for role, words in pairs if role in _SYSTEM]
    if strict_roles and (told or len(turns) < len(messages)):
        raise Refusal(
            "messages must have the roles user and assistant in turn, without system",
            param="messages",
        )
    if not turns or turns[0].role != "user" or turns[-1].role != "user":
        raise Refusal(
            "messages must begin and end with the user's, beside those of the system, "
            f"got {[message.role for message in messages[:9]]}",
            param="messages",
        )
    system = "\n\n".join(filter(None, told))
    first = turns[0]._replace(content=with_system(system, turns[0].content))
    parts = [tokens for tokens, _ in encode_messages([first, *turns[1:]], tokenizer)]
    tokens = [token for part in parts for token in part]
    ends = itertools.accumulate(map(len, parts[:-1]))
    # After a turn of the user's come the words that open the model's: the next prompt has them too.
    marks = {*list(ends)[-_KEPT_TURNS:], len(tokens) - 1}
    if system:
        marks.add(_same(tokens, _opening(system, tokenizer)))
    return PromptTokens(tuple(tokens), tuple(sorted(marks)))


def _words(message: ChatMessage, name: str) -> str:
    """The words of a message.

    Raises:
      Refusal: It has a role or a part that the server does not know.
    """
    if message.role not in (*_SYSTEM, *_ROLES):
        raise Refusal(
            f"{name}.role must be system, developer, user or assistant, got {message.role[:40]!r}",
            param=f"{name}.role",
        )
    for field in ("tool_calls", "function_call"):
        if getattr(message, field):
            raise Refusal(f"{name}.{field} is not supported", param=f"{name}.{field}")
    parts = message.content
    if parts is None:
        raise Refusal(f"{name}.content must be a text, got none", param=f"{name}.content")
    if not isinstance(parts, str):
        other = [part.type for part in parts if part.type != "text" or part.text is None]
        if other:
            raise Refusal(
                f"{name}.content must have parts of the type text, got {other[0][:40]!r}",
                param=f"{name}.content",
            )
        parts = "\n".join(part.text or "" for part in parts)
    return _text(parts, f"{name}.content")


def _opening(system: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a chat's beginning, up to the user's first words; rare ones stand for these."""
    first = Message("user", with_system(system, "\N{SNOWMAN}"))
    ((tokens, _),) = encode_messages([first], tokenizer)
    return tokens


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two prompts share."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
