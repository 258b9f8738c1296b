"""Text to tokens and back, for clients that count, score or render chats themselves."""

from __future__ import annotations

from typing import Any

from recurrentgemma.common.tokenizer import START_OF_TURN, Tokenizer
from recurrentgemma.common.vocabulary import byte_of
from recurrentgemma.serve.prompts import read_chat
from recurrentgemma.serve.protocol import TokenizeBody
from recurrentgemma.serve.refusals import Refusal


class TokenTexts:
    """What each token of a vocabulary says by itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}
        self._anchor = tokenizer.encode("a")[1:]  # a first token may lose the space before it

    def __call__(self, token: int) -> tuple[str, list[int]]:
        """The text of a token, and its bytes."""
        if token not in self._known:
            self._known[token] = self._said(token)
        return self._known[token]

    def _said(self, token: int) -> tuple[str, list[int]]:
        tokenizer = self._tokenizer
        if token >= tokenizer.size:
            return f"<{token}>", []
        piece = tokenizer.piece(token)
        byte = byte_of(piece)
        if byte is not None:
            return (chr(byte) if byte < 128 else f"bytes:\\x{byte:02x}"), [byte]
        if not tokenizer.spoken([token]):
            return piece, [*piece.encode()]
        before = tokenizer.decode(self._anchor)
        text = tokenizer.decode([*self._anchor, token])[len(before) :]
        return text, [*text.encode()]


def tokenized(body: TokenizeBody, tokenizer: Tokenizer, strict_roles: bool) -> list[int]:
    """The tokens of a text or of a chat.

    Raises:
      Refusal: There is neither, or it breaks a rule.
    """
    if body.messages is not None:
        return [*read_chat(body.messages, tokenizer, strict_roles=strict_roles).tokens]
    if body.prompt is None:
        raise Refusal("a prompt or messages must be given, got none", param="prompt")
    try:
        tokens = tokenizer.encode(body.prompt)
    except ValueError as error:
        raise Refusal(str(error), param="prompt") from None
    if body.add_special_tokens is not False:
        return tokens
    # The name of a special token alone is that token: so lm-eval finds out its id.
    special = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    named = [token for token in special if tokenizer.piece(token) == body.prompt]
    return named[:1] or tokens[1:]


def tokenizer_info(tokenizer: Tokenizer) -> dict[str, Any]:
    """What clients need to know of the tokenizer."""
    info = {
        "tokenizer_class": type(tokenizer.vocab).__name__,
        "vocab_size": tokenizer.size,
        "add_bos_token": False,  # the server adds it where it is not there
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "pad_token": tokenizer.piece(tokenizer.pad_id),
    }
    if tokenizer.end_of_turn_id is not None:
        info["chat_template"] = chat_template()
    return info


def chat_template() -> str:
    """The template in Jinja's language, for clients that render chats themselves."""
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        f"{{{{ '{START_OF_TURN}' + role + '\\n' + message['content'] + '<end_of_turn>\\n' }}}}"
        "{% endfor %}{% if add_generation_prompt %}"
        f"{{{{ '{START_OF_TURN}model\\n' }}}}{{% endif %}}"
    )
