"""Many clients of a server at once: some leave, some never read, all texts are compared.

    python benchmarks/serve_load.py --minutes 30 --serve "--framework torch --slots 8"

Each round has 200 clients; a fourth of them is killed in mid-stream, one never reads. Between the
rounds it prints the server's memory and open files. At the end the server gets SIGTERM under load
and must answer all that it has accepted. With --url it asks a server that runs already, once.
The server is --reproducible: else two tokens that are equally likely up to rounding may swap.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PROMPTS = ("In the beginning", "Emma was", "And it came to pass", "It is a truth " * 30)


@dataclasses.dataclass
class Report:
    """What became of the requests."""

    complete: int = 0
    told_to_wait: int = 0
    left: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    tokens: int = 0
    first_token_s: list[float] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        times = sorted(self.first_token_s) or [0.0]
        return (
            f"{self.complete} complete, {self.told_to_wait} told to wait, {self.left} left early, "
            f"{len(self.wrong)} wrong; {self.tokens} tokens; first token after "
            f"{times[len(times) // 2]:.2f} s (median), {times[-1 - len(times) // 20]:.2f} s (95 %)"
        )


def post(url: str, body: dict[str, Any], key: str = ""):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=600)


def text_of(url: str, body: dict[str, Any], key: str = "") -> str:
    with post(url, body, key) as reply:
        return json.load(reply)["choices"][0]["text"]


def bodies_of(max_tokens: int) -> list[dict[str, Any]]:
    """Greedy and seeded requests, whose texts are the same whenever they are asked."""
    return [
        {"prompt": prompt, "max_tokens": max_tokens, "seed": 1, "ignore_eos": True} | sampling
        for prompt in PROMPTS
        for sampling in ({"temperature": 0}, {"temperature": 0.8, "top_p": 0.9})
    ]


def load(
    url: str, *, clients: int, requests: int, max_tokens: int = 32, leaving: float = 0.2,
    seed: int = 0, key: str = "", expected: list[str] | None = None,
) -> Report:  # fmt: skip
    """Asks for greedy and seeded texts, each known from a request alone before."""
    report, lock = Report(), threading.Lock()
    bodies = bodies_of(max_tokens)
    expected = expected or [text_of(url, body, key) for body in bodies]

    def one(number: int) -> None:
        draw = random.Random(f"{seed} {number}")
        which, leaves = draw.randrange(len(bodies)), draw.random() < leaving
        started, pieces, first = time.monotonic(), [], None
        try:
            with post(url, bodies[which] | {"stream": True}, key) as reply:
                for line in reply:
                    if not line.startswith(b"data: {"):
                        continue
                    pieces.append(json.loads(line[6:])["choices"][0]["text"])
                    first = first or time.monotonic() - started
                    if leaves and len(pieces) > min(3, max_tokens - 2):
                        break
        except urllib.error.HTTPError as error:
            if error.code != 429:
                raise
            with lock, error:
                report.told_to_wait += 1
            return
        with lock:
            report.first_token_s.append(first or 0.0)
            if leaves:
                report.left += 1
                return
            report.complete += 1
            report.tokens += max_tokens
            if "".join(pieces) != expected[which]:
                report.wrong.append("".join(pieces))

    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(one, number) for number in range(requests)]:
            done.result()
    return report


@contextlib.contextmanager
def never_reading(url: str, max_tokens: int = 2000) -> Iterator[None]:
    """A client that asks for a long text, reads nothing, and is gone without a word in the end."""
    host, _, port = url.removeprefix("http://").partition(":")
    body = json.dumps({"prompt": "x", "max_tokens": max_tokens, "stream": True}).encode()
    with socket.create_connection((host, int(port))) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}"
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        yield


@contextlib.contextmanager
def serving(
    options: str, reproducible: bool = True
) -> Iterator[tuple[str, subprocess.Popen[str]]]:  # fmt: skip
    """A server of its own, with its address."""
    program = [sys.executable, "-m", "recurrentgemma", "serve", "--port", "0"]
    program += ["--reproducible"] * reproducible
    with subprocess.Popen(
        [*program, *shlex.split(options)], stderr=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stderr is not None
        try:
            ready = next(line for line in process.stderr if " at http://" in line)
            sys.stdout.write(ready)
            yield ready.split(" at ")[1].split()[0], process
        finally:
            process.terminate()


def held(pid: int) -> tuple[float, int]:
    """The memory of a process, in MB, and its open files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(f"/proc/{pid}/fd"))


def ends_with_the_last_answer(url: str, process: subprocess.Popen[str], expected: list[str]) -> int:
    """How many of 16 requests are answered when SIGTERM comes behind the last of them."""
    bodies = bodies_of(32)
    asked = threading.Barrier(17)

    def one(number: int) -> bool:
        which = number % len(bodies)
        with post(url, bodies[which] | {"stream": True}) as reply:
            asked.wait()  # the server has taken this one: its head is here
            chunks = [json.loads(line[6:]) for line in reply if line.startswith(b"data: {")]
        if "error" in chunks[-1]:  # the server gives answers 30 s to end
            return False
        return "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected[which]

    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(one, number) for number in range(16)]
        asked.wait()
        process.send_signal(signal.SIGTERM)
        return sum(answer.result() for answer in answers)


def endure(minutes: float, options: str, clients: int) -> bool:
    """Rounds of load until the time is over; whether all was as it must be."""
    end = time.monotonic() + 60 * minutes
    with serving(options) as (url, process):
        expected = [text_of(url, body) for body in bodies_of(32)]
        history, good, rounds = [], True, 0
        while time.monotonic() < end or rounds < 2:
            with never_reading(url):
                report = load(
                    url, clients=clients, requests=2 * clients, leaving=0.25, seed=rounds,
                    expected=expected,
                )  # fmt: skip
            rounds, good = rounds + 1, good and not report.wrong
            time.sleep(1)
            history.append(held(process.pid))
            print(f"{report}; {history[-1][0]:.0f} MB, {history[-1][1]} files", flush=True)
        (first, files), (last, files_) = history[len(history) // 3], history[-1]
        print(f"memory {first:.0f} MB after a third, {last:.0f} MB at the end")
        done = ends_with_the_last_answer(url, process, expected)
        print(f"SIGTERM under load: {done} of 16 answered, exit code {process.wait(60)}")
        flat = last < 1.03 * first + 5 and files_ <= files + 3
        return good and flat and done == 16 and process.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--serve", default="", metavar="OPTIONS", help="options of the server")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--key", default="")
    parser.add_argument("--requests", type=int, default=400)
    args = parser.parse_args()
    if args.url is None:
        sys.exit(not endure(args.minutes, args.serve, args.clients))
    started = time.monotonic()
    report = load(args.url, clients=args.clients, requests=args.requests, key=args.key)
    print(f"{report}; {report.tokens / (time.monotonic() - started):.1f} tokens/s")
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
