"""From the body of a request to jobs for the scheduler, every field checked."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

from recurrentgemma.common.generation.requests import RowRequest
from recurrentgemma.common.generation.stops import Stops
from recurrentgemma.common.generation.strategies import Categorical, Greedy, Sampling, row_keys
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma.serve.jobs import Job
from recurrentgemma.serve.prompts import PromptTokens, read_chat, read_prompts
from recurrentgemma.serve.protocol import MOST_ROWS, ChatBody, CompletionBody, SharedBody, within
from recurrentgemma.serve.refusals import Refusal
from recurrentgemma.serve.slots import MOST_BIASES, MOST_LOGPROBS, MOST_STOPS

_STOP_STRINGS = 16
_COMPLETION_TOKENS = 16  # as in OpenAI's API


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much a request may ask for.

    Attributes:
      length: Tokens of a prompt and its continuation.
      chat_tokens: Tokens of a chat's answer where the request does not say.
    """

    length: int = 32_768
    chat_tokens: int = 1024


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
      jobs: One for each prompt.
      prompts: The prompts.
      samples: Rows of each prompt.
      echo: Whether the prompt is part of the answer.
      num_logprobs: How many of the likeliest tokens to report; None reports none.
      stream: Whether the answer comes in pieces.
      include_usage: Whether the last piece has the numbers of tokens.
    """

    jobs: list[Job]
    prompts: list[PromptTokens]
    samples: int
    echo: bool
    num_logprobs: int | None
    stream: bool
    include_usage: bool


def completion(
    body: CompletionBody, tokenizer: Tokenizer, vocab_size: int, limits: Limits, salt: str
) -> Asked:
    """What a completion asks for.

    Raises:
      Refusal: A field breaks a rule.
    """
    prompts = read_prompts(body.prompt, tokenizer, vocab_size)
    count = within("logprobs", body.logprobs, None, 0, min(MOST_LOGPROBS, vocab_size))
    echo = bool(body.echo)
    steps = within("max_tokens", body.max_tokens, _COMPLETION_TOKENS, 0 if echo else 1, 10**9)
    scored = echo and count is not None
    always = {tokenizer.eos_id: "eos"}
    return _asked(body, prompts, steps, "max_tokens", always, count, scored, echo, limits, salt,
                  tokenizer, vocab_size)  # fmt: skip


def chat(
    body: ChatBody,
    tokenizer: Tokenizer,
    vocab_size: int,
    limits: Limits,
    salt: str,
    strict_roles: bool = False,
) -> Asked:
    """What a chat asks for.

    Raises:
      Refusal: A field breaks a rule.
    """
    prompt = read_chat(body.messages, tokenizer, strict_roles=strict_roles)
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    default = min(limits.chat_tokens, max(1, limits.length - len(prompt.tokens)))
    steps = within(field, getattr(body, field), default, 1, 10**9)
    top = within("top_logprobs", body.top_logprobs, 0, 0, min(MOST_LOGPROBS, vocab_size))
    if top and not body.logprobs:
        raise Refusal("top_logprobs needs logprobs: true", param="top_logprobs")
    count = top if body.logprobs else None
    always = {tokenizer.eos_id: "eos", tokenizer.require_end_of_turn(): "end_of_turn"}
    return _asked(body, [prompt], steps, field, always, count, False, False, limits, salt,
                  tokenizer, vocab_size)  # fmt: skip


def _asked(
    body: SharedBody,
    prompts: list[PromptTokens],
    steps: int,
    field: str,
    always: dict[int, str],
    num_logprobs: int | None,
    scored: bool,
    echo: bool,
    limits: Limits,
    salt: str,
    tokenizer: Tokenizer,
    vocab_size: int,
) -> Asked:
    samples = within("n", body.n, 1, 1, MOST_ROWS)
    source = "prompt" if isinstance(body, CompletionBody) else "messages"
    if body.best_of not in (None, samples):
        raise Refusal("best_of is not supported but for the value of n", param="best_of")
    if samples * len(prompts) > MOST_ROWS:
        raise Refusal(
            f"n times the number of prompts must be at most {MOST_ROWS}, got {samples} times "
            f"{len(prompts)}",
            param="n" if samples > 1 else "prompt",
        )
    for prompt in prompts:
        if len(prompt.tokens) + bool(steps) > limits.length:
            raise Refusal(
                f"{source} must have at most {limits.length - bool(steps)} tokens, got "
                f"{len(prompt.tokens)}",
                param=source,
                code="context_length_exceeded",
            )
        if len(prompt.tokens) + steps > limits.length:
            raise Refusal(
                f"the prompt and {field} must have at most {limits.length} tokens together, got "
                f"{len(prompt.tokens)} and {steps}",
                param=field,
                code="context_length_exceeded",
            )
    sampling, stops = _sampling(body, vocab_size), _stops(body, always, vocab_size)
    seed = within("seed", body.seed, None, -(2**63), 2**64 - 1, "a 64-bit integer")
    priority = within("priority", body.priority, 0, -(2**31), 2**31 - 1)
    jobs = []
    for prompt in prompts:
        keys: Sequence[Any] = [None] * samples
        if isinstance(sampling, Categorical):
            keys = row_keys([secrets.randbits(64) if seed is None else seed], 1, samples)
        rows = [RowRequest(steps, sampling, stops, key) for key in keys] if steps else []
        jobs.append(
            Job(prompt.tokens, rows, num_logprobs, scored, prompt.marks, salt, priority)
        )  # fmt: skip
    options = body.stream_options
    return Asked(
        jobs,
        prompts,
        samples,
        echo,
        num_logprobs,
        bool(body.stream),
        bool(options is not None and options.include_usage),
    )


def _sampling(body: SharedBody, vocab_size: int) -> Sampling:
    temperature = within("temperature", body.temperature, 1.0, 0, 100)
    bias = _logit_bias(body.logit_bias or {}, vocab_size)
    penalties = {
        name: within(name, getattr(body, name), 0.0, -2, 2)
        for name in ("presence_penalty", "frequency_penalty")
    }
    penalty = 1.0 if body.repetition_penalty is None else body.repetition_penalty
    top_k = within("top_k", body.top_k, None, -1, 2**31 - 1)
    try:
        if temperature == 0:
            return Greedy(penalty, logit_bias=bias, **penalties)
        return Categorical(
            temperature,
            None if top_k in (None, -1, 0) else top_k,
            1.0 if body.top_p is None else body.top_p,
            0.0 if body.min_p is None else body.min_p,
            penalty,
            logit_bias=bias,
            **penalties,
        )
    except ValueError as error:  # it begins with the name of the field
        raise Refusal(str(error), param=str(error).partition(" ")[0]) from None


def _logit_bias(value: dict[str, float], vocab_size: int) -> dict[int, float]:
    """The bias of each token.

    Raises:
      Refusal: One is no token, or a bias is out of bounds.
    """
    ids = {token: int(token) for token in value if token.isdecimal() and len(token) < 10}
    good = len(ids) == len(value) and all(token < vocab_size for token in ids.values())
    if not good or len(value) > MOST_BIASES or not all(-100 <= v <= 100 for v in value.values()):
        raise Refusal(
            f"logit_bias must have at most {MOST_BIASES} token ids from 0 to {vocab_size - 1}, "
            "each with a number from -100 to 100",
            param="logit_bias",
        )
    return {ids[token]: bias for token, bias in value.items()}


def _stops(body: SharedBody, always: dict[int, str], vocab_size: int) -> Stops:
    strings = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(strings) > _STOP_STRINGS or not all(strings):
        got = len(strings) if all(strings) else "an empty one"
        raise Refusal(
            f"stop must be at most {_STOP_STRINGS} strings that are not empty, got {got}",
            param="stop",
        )
    ids = body.stop_token_ids or []
    if len(ids) > MOST_STOPS - len(always) or not all(0 <= token < vocab_size for token in ids):
        raise Refusal(
            f"stop_token_ids must be at most {MOST_STOPS - len(always)} ids from 0 to "
            f"{vocab_size - 1}",
            param="stop_token_ids",
        )
    own = {} if body.ignore_eos else always
    return Stops(dict.fromkeys(ids, "stop_id") | own, tuple(strings))
