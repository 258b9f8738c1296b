"""From what the scheduler delivers to the objects that clients read."""

from __future__ import annotations

import asyncio
import collections
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma.serve.asking import Asked
from recurrentgemma.serve.jobs import Event, Failed, Growth, Job, PromptRead
from recurrentgemma.serve.tokens import TokenTexts

PING_S = 15.0


class Mailbox:
    """The events of the jobs of one request, in the event loop's thread."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._events: list[tuple[Job, Event]] = []
        self._waiting: asyncio.Future[None] | None = None
        self._open = sum(max(1, len(job.rows)) for job in jobs)
        self._jobs = jobs
        for job in jobs:
            job.listener = self

    def put(self, job: Job, event: Event) -> None:
        """Adds an event."""
        self._events.append((job, event))
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def __aiter__(self) -> AsyncIterator[list[tuple[int, Event]]]:
        return self._all()

    async def _all(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """The events with the numbers of their jobs, as they come, until all rows have ended.

        A group is empty where nothing came for `PING_S` seconds.

        Raises:
          Exception: What a job failed with.
        """
        numbers = {job: number for number, job in enumerate(self._jobs)}
        loop = asyncio.get_running_loop()
        while self._open:
            if not self._events:
                self._waiting = loop.create_future()
                ping = loop.call_later(PING_S, self._wake)
                try:
                    await self._waiting
                finally:
                    ping.cancel()
            events, self._events = self._events, []
            group: list[tuple[int, Event]] = []
            for job, event in events:
                if isinstance(event, Failed):
                    raise event.error
                ends = event.finish_reason if isinstance(event, Growth) else not job.rows
                self._open -= bool(ends)
                group.append((numbers[job], event))
            yield group

    def close(self) -> None:
        """Nobody waits any more: rows that still grow leave their slots."""
        for job in self._jobs:
            job.cancelled = True


class TokenLogProb(NamedTuple):
    """How likely a token was.

    Attributes:
      token: Its id.
      logprob: Its log-probability; None for a token with nothing before it.
      top: The likeliest tokens in its place, with their log-probabilities.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


class Part(NamedTuple):
    """What an event adds to a choice.

    Attributes:
      choice: The choice's number.
      text: The text that it adds.
      logprobs: The tokens that it adds; empty where they are not asked for.
      reason: Why the choice ends; None where it goes on.
    """

    choice: int
    text: str
    logprobs: list[TokenLogProb]
    reason: str | None = None


class Answer:
    """What one request is answered with, in pieces or whole.

    Attributes:
      object: The kind of a whole answer.
      piece: The kind of a piece.
      cached: Tokens of the prompts that kept states had read.
      generated: Tokens that were generated.
    """

    object: str
    piece: str
    prefix: str

    def __init__(self, asked: Asked, model: str, tokenizer: Tokenizer, texts: TokenTexts) -> None:
        self.asked, self._tokenizer, self._texts = asked, tokenizer, texts
        self.cached = self.generated = 0
        identity = f"{self.prefix}-{secrets.token_hex(12)}"
        self._head = {"id": identity, "created": int(time.time()), "model": model}
        self._offsets: collections.Counter[int] = collections.Counter()

    @property
    def num_choices(self) -> int:
        """How many texts the answer has."""
        return len(self.asked.jobs) * self.asked.samples

    @property
    def usage(self) -> dict[str, Any]:
        """The numbers of tokens."""
        read = sum(len(prompt.tokens) for prompt in self.asked.prompts)
        return {
            "prompt_tokens": read,
            "completion_tokens": self.generated,
            "total_tokens": read + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def parts(self, number: int, event: Event) -> list[Part]:
        """What an event of the job with this number adds to the choices."""
        first = number * self.asked.samples
        if isinstance(event, PromptRead):
            self.cached += event.cached
            text, logprobs = self._echoed(number, event)
            reason = None if self.asked.jobs[number].rows else "length"
            indices = range(first, first + self.asked.samples)
            return [Part(index, text, logprobs, reason) for index in indices]
        assert isinstance(event, Growth)
        self.generated += len(event.tokens)
        scored = zip(event.tokens, event.logprobs or (), strict=bool(event.logprobs))
        logprobs = [_token_logprob(token, *scores) for token, scores in scored]
        reason = event.finish_reason
        if reason is not None:
            reason = "length" if reason == "length" else "stop"
        return [Part(first + event.row, event.text, logprobs, reason)]

    def _echoed(self, number: int, event: PromptRead) -> tuple[str, list[TokenLogProb]]:
        """The prompt as a part of the answer; the BOS that the server adds is no part of it."""
        if not self.asked.echo:
            return "", []
        prompt = self.asked.prompts[number]
        bos, *tokens = prompt.tokens
        logprobs = []
        if event.scores is not None:
            scored = zip(tokens, *event.scores, strict=True)
            logprobs = [_token_logprob(*token) for token in scored]
            if prompt.own_bos:
                logprobs.insert(0, TokenLogProb(bos, None, []))
        return self._tokenizer.decode(tokens), logprobs

    def chunk(self, choices: list[dict[str, Any]], *, usage: bool = False) -> dict[str, Any]:
        """A piece of the answer."""
        chunk = {**self._head, "object": self.piece, "choices": choices}
        if self.asked.include_usage:
            chunk["usage"] = self.usage if usage else None
        return chunk

    def deltas(self, part: Part) -> list[dict[str, Any]]:
        """The choices of the pieces that a part of the answer makes: what it adds, and the end."""
        deltas = []
        if part.text or part.logprobs:
            deltas.append(self._choice(part._replace(reason=None), whole=False))
        if part.reason is not None:
            deltas.append(self._choice(Part(part.choice, "", [], part.reason), whole=False))
        return deltas

    def whole(self, parts: Sequence[Part]) -> dict[str, Any]:
        """The answer as one object."""
        groups: dict[int, list[Part]] = collections.defaultdict(list)
        for part in parts:
            groups[part.choice].append(part)
        choices = []
        for index, group in sorted(groups.items()):
            text = "".join(part.text for part in group)
            logprobs = [logprob for part in group for logprob in part.logprobs]
            choice = Part(index, text, logprobs, group[-1].reason)
            choices.append(self._choice(choice, whole=True))
        return {**self._head, "object": self.object, "choices": choices, "usage": self.usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first piece of a choice, if it has one before the text."""
        del index

    def _choice(self, part: Part, *, whole: bool) -> dict[str, Any]:
        """A choice as clients read it, whole or what a part adds to it."""
        raise NotImplementedError


class CompletionAnswer(Answer):
    """The answer to a completion."""

    object, piece, prefix = "text_completion", "text_completion", "cmpl"

    def _choice(self, part: Part, *, whole: bool) -> dict[str, Any]:
        del whole
        logprobs = None
        if self.asked.num_logprobs is not None:
            logprobs = self._columns(part.choice, part.logprobs)
        return {
            "index": part.choice,
            "text": part.text,
            "logprobs": logprobs,
            "finish_reason": part.reason,
        }

    def _columns(self, index: int, logprobs: list[TokenLogProb]) -> dict[str, Any]:
        offsets = []
        for entry in logprobs:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._texts(entry.token)[0])
        return {
            "tokens": [self._texts(entry.token)[0] for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [self._top(entry) for entry in logprobs],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogProb) -> dict[str, float] | None:
        """The likeliest tokens by text, with the token itself."""
        if entry.logprob is None:
            return None
        top: dict[str, float] = {}
        for token, logprob in entry.top:
            top.setdefault(self._texts(token)[0], logprob)
        # To the bit: lm-eval asks whether the token's own number is the largest.
        return top | {self._texts(entry.token)[0]: entry.logprob}


class ChatAnswer(Answer):
    """The answer to a chat."""

    object, piece, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _choice(self, part: Part, *, whole: bool) -> dict[str, Any]:
        if whole:
            said = {"message": {"role": "assistant", "content": part.text, "refusal": None}}
        else:
            said = {"delta": {} if part.reason else {"content": part.text}}
        logprobs = None
        if self.asked.num_logprobs is not None and (whole or part.logprobs):
            logprobs = {"content": [self._entry(entry) for entry in part.logprobs]}
        return {
            "index": part.choice,
            **said,
            "logprobs": logprobs,
            "finish_reason": part.reason,
        }

    def _entry(self, entry: TokenLogProb) -> dict[str, Any]:
        return {
            **self._said(entry.token, entry.logprob),
            "top_logprobs": [self._said(*pair) for pair in entry.top],
        }

    def _said(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, content = self._texts(token)
        return {"token": text, "logprob": logprob, "bytes": content}


def _token_logprob(token: int, chosen: Any, top_tokens: Any, top: Any) -> TokenLogProb:
    pairs = zip(map(int, top_tokens), map(float, top), strict=True)
    return TokenLogProb(token, float(chosen), [*pairs])
