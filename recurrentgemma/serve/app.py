"""The routes of the server."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma.serve import asking
from recurrentgemma.serve.answers import Answer, ChatAnswer, CompletionAnswer, Mailbox
from recurrentgemma.serve.asking import Asked, Limits
from recurrentgemma.serve.guard import Guard, Rules, read_body
from recurrentgemma.serve.jobs import Event, Growth, Job
from recurrentgemma.serve.metrics import Metrics
from recurrentgemma.serve.pages import PAGE, page_file
from recurrentgemma.serve.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    parsed,
)
from recurrentgemma.serve.refusals import Refusal
from recurrentgemma.serve.replies import EventStream, json_reply, refused, unless_gone
from recurrentgemma.serve.scheduler import FullError, Scheduler, StoppedError
from recurrentgemma.serve.tokens import TokenTexts, tokenized, tokenizer_info

_RETRY_S = 1
_ROUNDS = 3  # of the event loop, in which a request that has arrived becomes jobs
_SHORT = 2000  # bytes, whose tokens are found sooner than a thread takes over
_Body = TypeVar("_Body")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server is told at its start.

    Attributes:
      name: The model's name for clients.
      limits: How much a request may ask for.
      rules: Who may ask.
      strict_roles: Whether chats with a system part are refused.
      timeout: Seconds after which an answer ends with an error.
    """

    name: str
    limits: Limits = dataclasses.field(default_factory=Limits)
    rules: Rules = dataclasses.field(default_factory=Rules)
    strict_roles: bool = False
    timeout: float = 600.0


class Service:
    """One model behind HTTP.

    Attributes:
      scheduler: What generates.
      draining: Whether the server ends soon and takes no more requests.
      num_open: How many requests are being answered.
    """

    def __init__(
        self, make_scheduler: Callable[[Any], Scheduler], tokenizer: Tokenizer, settings: Settings
    ) -> None:
        """Prepares to serve.

        Args:
          make_scheduler: Makes a scheduler that delivers to what it is given.
          tokenizer: The model's tokenizer.
          settings: What the server is told.
        """
        self.scheduler = make_scheduler(self._deliver)
        self.draining, self.num_open = False, 0
        self._tokenizer, self._settings = tokenizer, settings
        self._vocab_size = self.scheduler.engine.config.vocab_size
        self._texts = TokenTexts(tokenizer)
        self._metrics = Metrics(self.scheduler)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = int(time.time())

    @property
    def ready(self) -> bool:
        """Whether the programs are compiled, so that requests are taken."""
        return self.scheduler.ready

    def app(self) -> Starlette:
        """The application for a server of ASGI."""
        routes = [
            Route("/v1/models", self._counted(self._models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._counted(self._model), methods=["GET"]),
            Route("/v1/completions", self._counted(self._completions), methods=["POST"]),
            Route("/v1/chat/completions", self._counted(self._chat), methods=["POST"]),
            Route("/tokenize", self._counted(self._tokenize), methods=["POST"]),
            Route("/detokenize", self._counted(self._detokenize), methods=["POST"]),
            Route("/tokenizer_info", self._counted(self._tokenizer_info), methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._prometheus, methods=["GET"]),
            *(Route(path, page_file) for path in PAGE),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(Guard, rules=self._settings.rules)],
            exception_handlers={HTTPException: _http_error, Exception: _defect},
        )

    def _deliver(self, pairs: list[tuple[Job, Event]]) -> None:
        """Takes events from the scheduler's thread to the event loop's."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_put, pairs)

    def _wake(self, rounds: int = _ROUNDS) -> None:
        """Wakes the scheduler after the requests that have arrived: they are read together."""
        if rounds:
            asyncio.get_running_loop().call_soon(self._wake, rounds - 1)
        else:
            self.scheduler.wake()

    def _counted(
        self, endpoint: Callable[[Request], Awaitable[Response | None]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint with refusals as answers, counted by path and status."""

        async def answer(request: Request) -> Response:
            self._loop = asyncio.get_running_loop()
            try:
                reply = await endpoint(request) or Response(status_code=499)
            except Refusal as refusal:
                reply = refused(refusal)
            except ClientDisconnect:
                reply = Response(status_code=499)  # which nobody reads
            path = request.scope["route"].path
            self._metrics.requests.labels(path, str(reply.status_code)).inc()
            return reply

        return answer

    async def _read(self, request: Request, kind: type[_Body]) -> _Body:
        content = await read_body(request, self._settings.rules.most_bytes)
        body = parsed(content, kind)
        name = getattr(body, "model", None)
        if name not in (None, "", self._settings.name):
            raise Refusal(
                f"there is no model {name[:80]!r}; there is {self._settings.name!r}",
                404,
                "model",
                "model_not_found",
            )
        return body

    async def _models(self, request: Request) -> Response:
        del request
        return json_reply({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self._settings.name:
            message = f"there is no such model; there is {self._settings.name!r}"
            raise Refusal(message, 404, "model", "model_not_found")
        return json_reply(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._settings.name,
            "object": "model",
            "created": self._started,
            "owned_by": "recurrentgemma",
            "max_model_len": self._settings.limits.length,
        }

    async def _completions(self, request: Request) -> Response | None:
        body = await self._read(request, CompletionBody)
        limits, salt = self._settings.limits, request.state.salt
        arguments = body, self._tokenizer, self._vocab_size, limits, salt
        asked = await _made(request, asking.completion, *arguments)
        return await self._answer(request, asked, CompletionAnswer)

    async def _chat(self, request: Request) -> Response | None:
        body = await self._read(request, ChatBody)
        asked = await _made(
            request,
            asking.chat,
            body,
            self._tokenizer,
            self._vocab_size,
            self._settings.limits,
            request.state.salt,
            self._settings.strict_roles,
        )
        return await self._answer(request, asked, ChatAnswer)

    async def _answer(
        self, request: Request, asked: Asked, kind: type[Answer]
    ) -> Response | None:  # fmt: skip
        """The answer to what is asked; None if the client went away."""
        if self.draining or not self.ready:
            raise Refusal("the server ends" if self.draining else "the server starts", 503)
        mailbox = Mailbox(asked.jobs)
        try:
            self.scheduler.submit(asked.jobs, wake=False)
            self._wake()
        except FullError as error:
            headers = {"retry-after": str(_RETRY_S)}
            raise Refusal(str(error), 429, code="queue_full", headers=headers) from None
        except StoppedError as error:
            raise Refusal(str(error), 503) from None
        self.num_open += 1
        answer = kind(asked, self._settings.name, self._tokenizer, self._texts)
        events = self._timed(mailbox)

        def close() -> None:
            mailbox.close()
            self.num_open -= 1

        if asked.stream:
            return EventStream(_pieces(events, answer), close, self._settings.timeout)
        try:
            async with asyncio.timeout(self._settings.timeout):
                whole = await unless_gone(request.receive, _whole(events, answer))
            return None if whole is None else json_reply(whole)
        except TimeoutError:
            message = f"the answer took more than {self._settings.timeout:.0f} s"
            raise Refusal(message, 504) from None
        finally:
            close()

    async def _timed(self, mailbox: Mailbox) -> AsyncIterator[list[tuple[int, Event]]]:
        """The events in groups, with the times noted.

        Raises:
          Refusal: A job failed.
        """
        started, first = time.monotonic(), True
        try:
            async for group in mailbox:
                if first and any(isinstance(event, Growth) for _, event in group):
                    self._metrics.first_token.observe(time.monotonic() - started)
                    first = False
                yield group
        except StoppedError as error:
            raise Refusal(str(error), 503) from None
        except Exception as error:
            raise Refusal(f"the engine failed: {error}", 500) from None
        self._metrics.duration.observe(time.monotonic() - started)

    async def _tokenize(self, request: Request) -> Response:
        body = await self._read(request, TokenizeBody)
        tokens = tokenized(body, self._tokenizer, self._settings.strict_roles)
        answer = {
            "tokens": tokens,
            "count": len(tokens),
            "max_model_len": self._settings.limits.length,
        }
        if body.return_token_strs:
            answer["token_strs"] = [self._texts(token)[0] for token in tokens]
        return json_reply(answer)

    async def _detokenize(self, request: Request) -> Response:
        body = await self._read(request, DetokenizeBody)
        if not all(0 <= token < self._vocab_size for token in body.tokens):
            rule = f"tokens must be ids from 0 to {self._vocab_size - 1}"
            raise Refusal(rule, param="tokens")
        return json_reply({"prompt": self._tokenizer.decode(body.tokens)})

    async def _tokenizer_info(self, request: Request) -> Response:
        del request
        return json_reply(tokenizer_info(self._tokenizer))

    async def _health(self, request: Request) -> Response:
        del request
        if self.scheduler.error is not None:
            return refused(Refusal("the engine has stopped", 503))
        if self.draining or not self.ready:
            return refused(Refusal("the server ends" if self.draining else "it starts", 503))
        return json_reply({"status": "ok"})

    async def _prometheus(self, request: Request) -> Response:
        del request
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")


async def _made(request: Request, make: Callable[..., Asked], *arguments: Any) -> Asked:
    """Turns a request into jobs. A long text takes time to tokenise: that happens in a thread."""
    size = request.headers.get("content-length", "")
    if size.isdecimal() and int(size) < _SHORT:
        return make(*arguments)
    return await asyncio.to_thread(make, *arguments)


def _put(pairs: list[tuple[Job, Event]]) -> None:
    for job, event in pairs:
        job.listener.put(job, event)


async def _pieces(
    groups: AsyncIterator[list[tuple[int, Event]]], answer: Answer
) -> AsyncIterator[tuple[list[Any], bool]]:
    """The chunks of a stream in groups, and whether the group is the last.

    An empty group says that nothing came for a while.
    """
    opened: set[int] = set()
    growing = answer.num_choices
    async for group in groups:
        chunks = []
        for number, event in group:
            for part in answer.parts(number, event):
                if part.choice not in opened:
                    opened.add(part.choice)
                    opening = answer.opening(part.choice)
                    if opening is not None:
                        chunks.append(answer.chunk([opening]))
                chunks += [answer.chunk([delta]) for delta in answer.deltas(part)]
                growing -= part.reason is not None
        if not growing and answer.asked.include_usage:
            chunks.append(answer.chunk([], usage=True))
        if chunks or not group:
            yield chunks, not growing


async def _whole(groups: AsyncIterator[list[tuple[int, Event]]], answer: Answer) -> dict[str, Any]:
    parts = []
    async for group in groups:
        for number, event in group:
            parts += answer.parts(number, event)
    return answer.whole(parts)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    paths = "/v1/models, /v1/completions, /v1/chat/completions, /tokenize, /detokenize, /health"
    message = {
        404: f"there is no {request.url.path[:80]!r}; there are {paths}",
        405: f"{request.url.path[:80]} does not take {request.method}",
    }.get(error.status_code, error.detail)
    return refused(Refusal(message, error.status_code, headers=dict(error.headers or {})))


async def _defect(request: Request, error: Exception) -> Response:
    del request, error
    return refused(Refusal("the server has a defect; its log says more", 500))
