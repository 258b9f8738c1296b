"""The chat in the browser: files of the package, which fetch nothing from elsewhere."""

from __future__ import annotations

import importlib.resources

from starlette.requests import Request
from starlette.responses import Response

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_POLICY = (
    "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'"
)


async def page_file(request: Request) -> Response:
    """The file at a path of `PAGE`."""
    file, media_type = PAGE[request.url.path]
    content = (importlib.resources.files("recurrentgemma.serve") / "page" / file).read_bytes()
    headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff"}
    return Response(content, media_type=media_type, headers=headers)
