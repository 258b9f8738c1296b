"""Who may ask, how much, and what becomes of requests when clients leave or the server ends."""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import ask, complete

from recurrentgemma.cli import main
from recurrentgemma.serve.guard import Rules

LONG = {"prompt": "x", "max_tokens": 20_000, "ignore_eos": True, "temperature": 0}


def wait_until(condition, seconds: float = 60) -> None:
    """Waits until something holds; the limit is only there to end a test that fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


@contextlib.contextmanager
def streaming(server, body: dict[str, Any]):
    """A client that has read the beginning of a stream."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body | {"stream": True}).encode()
    with socket.create_connection((host, int(port)), timeout=60) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}"
        client.sendall(f"{head}\r\n\r\n".encode() + content)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        yield client


def test_a_key_is_needed(start) -> None:
    with start(rules=Rules(keys=("one", "two"))) as server:
        for header in ({}, {"authorization": "Bearer three"}, {"authorization": "Basic one"},
                       {"authorization": "Bearer"}, {"authorization": "one"}):  # fmt: skip
            status, answer = ask(server, "/v1/models", **header)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert answer["error"]["type"] == "authentication_error"
            assert ask(server, "/metrics", **header)[0] == 401
        assert ask(server, "/health")[0] == 200
        # A state that one key's text left is not for another's.
        body = {"prompt": "And it came to pass in those days. " * 12, "max_tokens": 1}
        cached = []
        for key in ("one", "one", "two"):
            headers = {"authorization": f"Bearer {key}"}
            status, answer = ask(server, "/v1/completions", body, **headers)
            assert status == 200
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0)
        assert cached == [False, True, False]


def test_other_pages_and_names_are_refused(start) -> None:
    with start(rules=Rules(origins=("https://a.example",), hosts=("127.0.0.1",))) as server:
        assert ask(server, "/v1/models", host="evil.example")[0] == 403
        assert ask(server, "/v1/models", origin="https://b.example")[0] == 403
        assert ask(server, "/v1/models", origin=server.url)[0] == 200
        assert ask(server, "/v1/models", origin="https://a.example")[0] == 200
        request = urllib.request.Request(
            f"{server.url}/v1/models", headers={"Origin": "https://a.example"}, method="OPTIONS"
        )
        with urllib.request.urlopen(request) as reply:
            assert reply.headers["access-control-allow-origin"] == "https://a.example"
            assert reply.status == 204


def test_limits(start) -> None:
    with start(num_slots=1, most_waiting=1, rules=Rules(most_bytes=1000)) as server:
        assert ask(server, "/v1/completions", b" " * 1001)[0] == 413
        with streaming(server, LONG):
            wait_until(lambda: server.service.scheduler.slots.active)
            with streaming(server, LONG):
                wait_until(lambda: server.service.scheduler.num_waiting)
                status, answer = ask(server, "/v1/completions", {"prompt": "x"})
                assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
                assert "at most 1 prompts may wait" in answer["error"]["message"]
        wait_until(lambda: not server.service.scheduler.busy)
        assert complete(server, "x", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_an_answer_that_takes_too_long_ends_with_an_error(start) -> None:
    with start(timeout=0.3) as server:
        status, answer = ask(server, "/v1/completions", LONG)
        assert (status, answer["error"]["type"]) == (504, "timeout_error")
        with streaming(server, LONG) as client:
            content = b""
            while part := client.recv(65536):
                content += part
                if b"[DONE]" in content:
                    break
        assert b'data: {"error":{"message":"the answer took more than' in content
        wait_until(lambda: not server.service.scheduler.busy)


def test_a_quiet_stream_says_that_it_lives(start, monkeypatch) -> None:
    monkeypatch.setattr("recurrentgemma.serve.answers.PING_S", 0.02)
    with start(num_slots=1) as server, streaming(server, LONG):
        wait_until(lambda: server.service.scheduler.slots.active)
        with streaming(server, LONG) as client:
            content = b""
            while b": ping\n\n" not in content:
                content += client.recv(4096)


def test_clients_that_leave_free_their_slots(server) -> None:
    """In the middle of a stream, before the answer, or without ever reading."""
    expected = complete(server, "y", max_tokens=25, temperature=0)["choices"][0]["text"]
    scheduler = server.service.scheduler

    def leave(number: int) -> None:
        with streaming(server, LONG) as client:
            client.recv(50 * (number % 3) + 1)

    def stay(number: int) -> str:
        answer = complete(server, "y", max_tokens=25, temperature=0)
        return answer["choices"][0]["text"]

    never = contextlib.ExitStack()
    with never, ThreadPoolExecutor(12) as pool:
        never.enter_context(streaming(server, LONG | {"max_tokens": 300}))
        texts = [pool.submit(stay if number % 3 else leave, number) for number in range(24)]
        assert {text.result() for text in texts} == {expected, None}
    wait_until(lambda: not scheduler.busy)
    assert server.service.num_open == 0


def test_many_clients_complete_or_are_told_to_wait(start) -> None:
    """The short form of benchmarks/serve_load.py."""
    path = Path(__file__).resolve().parents[2] / "benchmarks/serve_load.py"
    script = runpy.run_path(str(path))
    with start(most_waiting=20) as server:
        files = "/proc/self/fd"
        before = len(os.listdir(files)) if os.path.isdir(files) else 0
        with script["never_reading"](server.url):
            report = script["load"](server.url, clients=40, requests=60, max_tokens=4, leaving=0.3)
        assert report.complete + report.told_to_wait + report.left == 60
        assert report.complete >= 10
        assert report.wrong == []
        wait_until(lambda: not server.service.scheduler.busy and not server.service.num_open)
        wait_until(lambda: not before or len(os.listdir(files)) <= before + 5)


def test_a_draining_server_ends_with_the_last_answer(start) -> None:
    """Also of those that wait for a slot."""
    with start() as server, ThreadPoolExecutor(12) as pool:
        body = LONG | {"max_tokens": 40}
        answers = [pool.submit(ask, server, "/v1/completions", body) for _ in range(12)]
        wait_until(lambda: server.service.num_open == 12)
        server.server.drain()
        # On a connection of its own the next request may be refused in either way.
        with contextlib.suppress(OSError):
            assert ask(server, "/v1/completions", {"prompt": "x"})[0] == 503
            assert ask(server, "/health")[0] == 503
        for answer in answers:
            status, whole = answer.result()
            assert (status, whole["usage"]["completion_tokens"]) == (200, 40)


def test_a_broken_engine_is_told(start, monkeypatch, caplog) -> None:
    with start() as server:

        def broken(*args):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(server.sampler.engine, "decode", broken)
        status, answer = ask(server, "/v1/completions", {"prompt": "x"})
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert ask(server, "/health")[0] == 503
        assert ask(server, "/v1/completions", {"prompt": "x"})[0] == 503
        assert "the engine has stopped" in caplog.text


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n"),
        *("seed", "stop", "stop_token_ids", "logprobs", "top_logprobs", "echo", "stream"),
        *("stream_options", "logit_bias", "presence_penalty", "priority", "model", "best_of"),
        *("ignore_eos", "repetition_penalty", "frequency_penalty", "tools", "suffix"),
    ]
)


@settings(max_examples=60)
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]),
    body=st.dictionaries(FIELDS, VALUES, max_size=5),
    raw=st.binary(max_size=20) | st.none(),
)
def test_no_body_harms_the_server(server, path: str, body: dict[str, Any], raw) -> None:
    good = {"prompt": "x", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
    content = json.dumps(good | body).encode() if raw is None else raw
    if body.get("stream") is True:
        body["stream"] = content = b'{"stream": true}'  # its events are no single object
    status, answer = ask(server, path, content)
    assert status in (200, 400, 404)
    if status != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert len(answer["error"]["message"]) < 500
    assert server.service.scheduler.error is None


def test_the_command_refuses_what_is_not_safe(capsys) -> None:
    for arguments, message in (
        (["--host", "0.0.0.0"], "give --api-key KEY, or --insecure"),
        (["--api-key", " x"], "--api-key must be ASCII without spaces"),
        (["--state-cache", "lots"], "--state-cache must be a number of bytes such as 1GB"),
        (["--host", "no.such.host.invalid", "--insecure"], "cannot listen at no.such.host.invalid"),
        (["--port", "70000"], "--port"),
    ):
        assert main(["serve", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_command_serves_and_drains() -> None:
    """A process of its own: the port, the signal, the exit code."""
    import openai

    environment = os.environ | {"RECURRENTGEMMA_API_KEY": "secret"}
    program = [sys.executable, "-m", "recurrentgemma", "serve", "--checkpoint", "tiny"]
    program += ["--port", "0", "--slots", "2"]
    with subprocess.Popen(
        program, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:  # fmt: skip
        assert process.stderr is not None
        try:
            lines = iter(process.stderr.readline, "")
            ready = next(line for line in lines if " at http://" in line)
            url = ready.split(" at ")[1].split()[0]
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
            assert [model.id for model in client.models.list()] == ["tiny"]
            options: dict[str, Any] = {"extra_body": {"ignore_eos": True}, "temperature": 0}
            stream = client.completions.create(
                model="tiny",
                prompt="Emma was",
                max_tokens=40,
                stream=True,
                **options,
            )
            text = [next(stream).choices[0].text]
            process.send_signal(signal.SIGTERM)
            text += [chunk.choices[0].text for chunk in stream]
            assert "".join(text).startswith(" not to be done")
            assert process.wait(60) == 0
        finally:
            process.kill()
