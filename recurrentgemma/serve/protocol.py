"""What clients send: the fields of OpenAI's API that the server reads.

A field that is not declared is ignored. `REFUSED` has those that ask for what the server does not
do: another value than the ones listed there is an error that names the field.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from recurrentgemma.serve.refusals import Refusal

MOST_ROWS = 128  # texts of one request, all prompts and samples together


class StreamOptions(msgspec.Struct):
    """What a stream has beside the text.

    Attributes:
      include_usage: Whether the last chunk has the numbers of tokens.
    """

    include_usage: bool | None = None


class SharedBody(msgspec.Struct, kw_only=True):
    """What completions and chats have in common; None is the default everywhere."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    user: str | None = None
    # What the server does not do; see `REFUSED`.
    response_format: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None
    use_beam_search: Any = None
    prompt_logprobs: Any = None


class CompletionBody(SharedBody, kw_only=True):
    """The body of `/v1/completions`."""

    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: Any = None


class TextPart(msgspec.Struct):
    """A part of a message: of type "text", or the server refuses it."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct):
    """What one side says.

    Attributes:
      role: Who: system, developer, user or assistant.
      content: The words, or parts of them.
      name: Ignored: the template has no place for it.
    """

    role: str
    content: str | list[TextPart] | None = None
    tool_calls: Any = None
    function_call: Any = None


class ChatBody(SharedBody, kw_only=True):
    """The body of `/v1/chat/completions`."""

    messages: list[ChatMessage] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    continue_final_message: Any = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """The body of `/tokenize`: a text, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """The body of `/detokenize`."""

    tokens: list[int]
    model: str | None = None


# The values that ask for nothing, beside null, an empty list and an empty string.
REFUSED: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "suffix": (),
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "continue_final_message": (False,),
}

_Body = TypeVar("_Body")
_PLACE = re.compile(r"^(?P<rule>.*) - at `\$\.?(?P<field>[^`]*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`")


def parsed(content: bytes, kind: type[_Body]) -> _Body:
    """The body of a request.

    Raises:
      Refusal: It is no JSON, a field has the wrong type, or asks for what the server does not do.
    """
    if not content:
        raise Refusal("the body must be a JSON object, got none")
    try:
        body = msgspec.json.decode(content, type=kind)
    except RecursionError:
        raise Refusal("the body is nested too deeply") from None
    except msgspec.ValidationError as error:
        found, missing = _PLACE.match(str(error)), _MISSING.match(str(error))
        if missing is not None:
            field = missing["field"] if found is None else f"{found['field']}.{missing['field']}"
            raise Refusal(f"{field} must be given, got none", param=field) from None
        if found is None:
            raise Refusal(f"the body must be a JSON object: {error}") from None
        field = found["field"]
        raise Refusal(f"{field}: {found['rule']}", param=field) from None
    except (msgspec.DecodeError, ValueError) as error:
        raise Refusal(f"the body must be JSON in UTF-8: {error}") from None
    for field, harmless in REFUSED.items():
        value = getattr(body, field, None)
        if value not in (None, [], "", *harmless):
            raise Refusal(f"{field} is not supported by this server", param=field)
    return body


def within(name: str, value: Any, default: Any, least: float, most: float, rule: str = "") -> Any:
    """A number within bounds, or the default if it is None.

    Raises:
      Refusal: It is out of bounds; `rule` says more about them.
    """
    if value is None:
        return default
    if not least <= value <= most:
        rule = rule or f"from {least} to {most}"
        raise Refusal(f"{name} must be {rule}, got {shown(value)}", param=name)
    return value


def shown(value: Any) -> str:
    """A value in a message, cut off where it is long."""
    text = str(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    return text if len(text) <= 60 else f"{text[:60]}..."
