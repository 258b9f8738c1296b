"""What goes out over HTTP: objects, errors, and streams that end when nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from recurrentgemma.serve.refusals import Refusal

_PING, _SEND_S = b": ping\n\n", 5.0
_Result = TypeVar("_Result")


def json_reply(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:  # fmt: skip
    """An object as JSON."""
    content = msgspec.json.encode(value)
    return Response(content, status, headers, "application/json")


def refused(refusal: Refusal) -> Response:
    """A refusal as JSON."""
    return json_reply(refusal.body, refusal.status, refusal.headers)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result | None:
    """What the work returns; None if the client goes away first, which cancels the work."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, one for each object; a comment for an empty group."""

    media_type = "text/event-stream"

    def __init__(
        self,
        objects: AsyncIterator[tuple[list[Any], bool]],
        close: Callable[[], None],
        timeout: float,
    ) -> None:
        """Prepares to send.

        Args:
          objects: Groups of objects, each sent at once, and whether the group is the last.
          close: Called at the end, also where the client goes away.
          timeout: Seconds after which the stream ends with an error.
        """
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._objects, self._close, self._timeout = objects, close, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._timeout + _SEND_S):  # if the client reads nothing
                await unless_gone(receive, self._send(send))
        except TimeoutError:
            pass
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        end = b""
        try:
            async with asyncio.timeout(self._timeout):
                async for objects, last in self._objects:
                    content = b"".join(map(event, objects)) or _PING
                    if last:  # goes out with the end: each write costs more than what it writes
                        end = content
                    else:
                        more = {"type": "http.response.body", "body": content, "more_body": True}
                        await send(more)
        except TimeoutError:
            end += event(Refusal(f"the answer took more than {self._timeout:.0f} s", 504).body)
        except Refusal as refusal:
            end += event(refusal.body)
        await send({"type": "http.response.body", "body": end + b"data: [DONE]\n\n"})


def event(value: Any) -> bytes:
    """An object as a server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
