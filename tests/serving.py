"""Asking a server over HTTP."""

import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from samplers import SUBMODULES, make_sampler

from recurrentgemma.common.extras import is_installed

FREE = {"ignore_eos": True}


SAMPLERS: dict[str, Any] = {}


def sampler_of(twin: str) -> Any:
    """The small model of a twin, made once."""
    if not is_installed(SUBMODULES[twin].partition(".")[0]):
        pytest.skip(f"{twin} is not installed")
    if twin not in SAMPLERS:
        SAMPLERS[twin] = make_sampler(twin)
    return SAMPLERS[twin]


def ask(server, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """The status and the object; a body that is no bytes goes as JSON."""
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(server.url + path, content, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def complete(server, prompt: Any, **options: Any) -> dict[str, Any]:
    status, answer = ask(server, "/v1/completions", {"prompt": prompt, **FREE, **options})
    assert status == 200, answer
    return answer


def chat(server, *messages: Any, **options: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
    status, answer = ask(server, "/v1/chat/completions", {"messages": said, **options})
    assert status == 200, answer
    return answer


def events(server, path: str, body: dict[str, Any]) -> list[Any]:
    """The objects of a stream."""
    request = urllib.request.Request(
        server.url + path, json.dumps(body | {"stream": True}).encode()
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        parts = reply.read().decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]
