"""What stands before the routes: who may ask, from where, and how much."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recurrentgemma.serve.pages import PAGE
from recurrentgemma.serve.refusals import Refusal
from recurrentgemma.serve.replies import refused

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OPEN = {*PAGE, "/health"}  # these tell nothing and start nothing
_BODY_S = 30.0


@dataclasses.dataclass(frozen=True)
class Rules:
    """Who may ask.

    Attributes:
      keys: Every request but those for the page and `/health` needs one of these; none asks for no
        key.
      origins: Web pages of these origins may ask, beside the server's own; "*" means all.
      hosts: The names by which the server may be called; None allows any. A page of another site
        whose name leads to this machine is refused by it.
      most_bytes: The largest body.
    """

    keys: tuple[str, ...] = ()
    origins: Collection[str] = ()
    hosts: Collection[str] | None = None
    most_bytes: int = 2_000_000


class Guard:
    """Refuses what breaks the rules before a route sees it, and notes the salt of the key."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        allowed = origin is not None and self._allows(origin)

        async def send_allowed(message: Message) -> None:
            if allowed and message["type"] == "http.response.start":
                reply = MutableHeaders(scope=message)
                reply["access-control-allow-origin"] = origin or ""
                reply.add_vary_header("Origin")
            await send(message)

        try:
            self._check_origin(headers, allowed)
            if allowed and scope["method"] == "OPTIONS":
                await _preflight(headers)(scope, receive, send_allowed)
                return
            scope.setdefault("state", {})["salt"] = self._salt(scope["path"], headers)
        except Refusal as refusal:
            await refused(refusal)(scope, receive, send_allowed)
            return
        await self._app(scope, receive, send_allowed)

    def _allows(self, origin: str) -> bool:
        return "*" in self._rules.origins or origin in self._rules.origins

    def _check_origin(self, headers: Headers, allowed: bool) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._rules.hosts is not None and _name(host) not in self._rules.hosts:
            raise Refusal(f"this server is not called {_name(host)[:80]!r}", 403)
        if origin is not None and not allowed and origin.partition("://")[2] != host:
            raise Refusal(
                f"pages of {origin[:80]!r} may not ask: --cors-origin allows them", 403
            )  # fmt: skip

    def _salt(self, path: str, headers: Headers) -> str:
        """Tells the clients of different keys apart; a kept state serves those of one key."""
        if not self._rules.keys or path in _OPEN:
            return ""
        kind, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if kind.lower() == "bearer" else ""
        # All keys are compared, each in constant time: the time tells nothing.
        same = [hmac.compare_digest(given.encode(), key.encode()) for key in self._rules.keys]
        if not any(same):
            raise Refusal(
                "the header must be 'Authorization: Bearer KEY' with a key of this server",
                401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return hashlib.sha256(given.encode()).hexdigest()


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _preflight(headers: Headers) -> Response:
    wanted = headers.get("access-control-request-headers", "authorization, content-type")
    return Response(
        status_code=204,
        headers={
            "access-control-allow-methods": "GET, POST",
            "access-control-allow-headers": wanted,
            "access-control-max-age": "600",
        },
    )


async def read_body(request: Request, most_bytes: int) -> bytes:
    """The body of a request.

    Raises:
      Refusal: It is too large, or does not come.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > most_bytes:
                    raise Refusal(f"the body must have at most {most_bytes} bytes", 413)
                parts.append(part)
    except TimeoutError:
        raise Refusal(f"the body must come within {_BODY_S:.0f} s", 408) from None
    return b"".join(parts)
