"""Tokens a second and the time to the first token over HTTP, at 1, 8 and 32 clients in turns.

    python benchmarks/serve_speed.py --serve "--framework torch --slots 32"
    python benchmarks/serve_speed.py --serve "--checkpoint gemma3-270m/" --clients 1 8 \
        --against-llamacpp gemma-3-270m-q4_k_m.gguf --llamacpp-python PYTHON
    python benchmarks/serve_speed.py --clients 1 8 --against-mlx FOLDER --mlx-python PYTHON
    python benchmarks/serve_speed.py --label "tiny-chat, JAX" \
        --output benchmarks/results/serve-tiny-jax-cpu

With --output the figures go into a file, under a label; `scripts/write_docs.py` makes tables of
these files. Each server runs all the time; rounds of them take turns, and the best round counts.
`stream` is the sampler's own in a process of its own: like a round, it begins with the prompt.
`scheduler` is the server's in such a process, without HTTP. The last lines are a conversation, with
seconds to the first token of each turn, and a system part of 2,000 tokens: read, and kept from an
earlier request.
PYTHON is an interpreter with the wheel xllamacpp, or with mlx-lm and mlx-cpu; this one unless you
say. FOLDER is the checkpoint as `convert --to huggingface` writes it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import selectors
import shlex
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from interleaved import publish
from rich.table import Table
from serve_load import serving

_ACCEPT_S = 0.02  # by then the server has accepted all connections
_ANSWER_BYTES = 1 << 20  # more than an answer has
REPLY = "And all went to be taxed, every one into his own city. " * 3
LLAMA_CPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], 0
params.n_parallel, params.n_ctx = int(sys.argv[2]), 1024 * int(sys.argv[2])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[3])
server = xllamacpp.Server(params)
print(server.listening_address, file=sys.stderr, flush=True)
time.sleep(10**6)
"""
# Each answers a line, a number of clients, with tokens a second.
LOAD = """
import gc, sys, threading, time
from recurrentgemma.cli.compilation_cache import use_compilation_cache
from recurrentgemma.cli.frameworks import choose_framework, find_checkpoint, load_sampler
from recurrentgemma.cli.serve import HOLD_S, in_passing_thread
from recurrentgemma.common.generation.requests import RowRequest
from recurrentgemma.common.generation.stops import Stops
from recurrentgemma.common.generation.strategies import Greedy
framework, checkpoint, dtype, slots, quantize, tokens = sys.argv[1:]
tokens, slots = int(tokens), int(slots or 8)
use_compilation_cache()
framework = choose_framework(framework or None)
path, vocabulary = find_checkpoint(checkpoint or None, None, chat=True)
def load():
    return load_sampler(
        framework, path, vocabulary, Greedy(), dtype or None, False, quantize=quantize or None,
        rows=slots).sampler
"""
STREAM = """
sampler = load()
def measured(clients):
    for _ in sampler.stream("0 Once upon a time", tokens, end_sampling_at_eos_token=False):
        pass
"""
SCHEDULER = """
sampler = in_passing_thread(load)
from recurrentgemma.serve.jobs import Growth, Job
from recurrentgemma.serve.scheduler import Scheduler
left, ended = 0, threading.Event()
def deliver(pairs):
    global left
    for _, event in pairs:
        left -= isinstance(event, Growth) and event.finish_reason is not None
    if not left:
        ended.set()
def measured(clients):
    global left
    left = clients
    ended.clear()
    for number in range(clients):
        prompt = tuple(vocabulary.encode(f"{number} Once upon a time"))
        scheduler.submit([Job(prompt, [RowRequest(tokens, Greedy(), Stops({}, ()))])])
    ended.wait()
capacity = sampler.engine.capacity_for(4096)
scheduler = Scheduler(
    sampler.engine, vocabulary, deliver, num_slots=slots, capacity=capacity, hold_s=HOLD_S)
scheduler.start()
gc.freeze()  # as `serve` does
"""
ANSWER = """
for line in sys.stdin:
    started = time.perf_counter()
    measured(int(line))
    print(int(line) * tokens / (time.perf_counter() - started), flush=True)
"""


class Round(NamedTuple):
    """What a round took.

    Attributes:
      rate: Tokens a second, all clients together.
      first_s: Seconds to the first token, the median of the clients.
    """

    rate: float
    first_s: float


def one_round(url: str, clients: int, tokens: int) -> Round:
    """All clients at once, in one thread, which takes little from the server beside it.

    After its first token a client sleeps until its answer has ended, and the kernel keeps what
    comes: clients on other machines would not use the server's cores either. The connections are
    there before, as in a client that keeps its own.
    """
    host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
    selector, times, seen, requests = selectors.DefaultSelector(), {}, {}, {}
    for number in range(clients):
        # Without ignore_eos a server may end early; the tokens that came are counted.
        body = {"prompt": f"{number} Once upon a time", "max_tokens": tokens, "temperature": 0,
                "stream": True, "ignore_eos": True,
                "stream_options": {"include_usage": True}}  # fmt: skip
        content = json.dumps(body).encode()
        client = socket.create_connection((host, int(port)))
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        requests[client], seen[client] = head.encode() + content, b""
        selector.register(client, selectors.EVENT_READ)
    time.sleep(_ACCEPT_S)
    started = time.perf_counter()
    for client, request in requests.items():
        client.sendall(request)
    while selector.get_map():
        for key, _ in selector.select():
            client: Any = key.fileobj
            data = client.recv(_ANSWER_BYTES)
            seen[client] += data
            if client not in times and b'"text":' in seen[client]:
                times[client] = time.perf_counter() - started
                # Readable again when the server has closed the connection.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _ANSWER_BYTES)
            if not data:
                selector.unregister(client)
                client.close()
    seconds = time.perf_counter() - started
    count = 0
    for content in seen.values():
        usage = content.rpartition(b'"completion_tokens":')[2].partition(b",")[0].rstrip(b"}")
        count += int(usage)
    return Round(count / seconds, statistics.median(times.values()))


def conversation(url: str, turns: int, name: str) -> list[float]:
    """Seconds to the first token of each turn; each adds as many tokens as the others.

    The model's own words are left out: random words that it says past its end may take four times
    as many tokens when they are read again.
    """
    messages, seconds = [], []
    for turn in range(turns):
        words = f"{name} {turn} And it came to pass in those days, that there was a decree. " * 4
        messages.append({"role": "user", "content": words})
        seconds.append(first_token_s(url, messages))
        messages.append({"role": "assistant", "content": REPLY})
    return seconds


def first_token_s(url: str, messages: list[dict[str, str]]) -> float:
    """Seconds to the first token of an answer, which is read to its end."""
    body = {"messages": messages, "max_tokens": 40, "temperature": 0, "stream": True,
            "ignore_eos": True}  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    started, first = time.perf_counter(), None
    with urllib.request.urlopen(request) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                said = choice["delta"].get("content")
                first = first or (said and time.perf_counter() - started) or None
    return first or 0.0


@contextlib.contextmanager
def llama_cpp(python: str, gguf: str, slots: int, threads: int) -> Iterator[str]:
    """llama.cpp's server, with its address."""
    command = [python, "-c", LLAMA_CPP, gguf, str(slots), str(threads)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield next(line.strip() for line in process.stderr if line.startswith("http://"))
        finally:
            process.kill()


@contextlib.contextmanager
def mlx_lm(python: str, folder: str) -> Iterator[str]:
    """The server of mlx-lm, with its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, "-m", "mlx_lm", "server", "--model", folder, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(300):
                time.sleep(0.2)
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                if process.poll() is not None:
                    raise SystemExit(f"mlx-lm ended: {shlex.join(command)}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@contextlib.contextmanager
def asked_by_line(program: str, options: str, tokens: int) -> Iterator[Callable[[int], float]]:
    """A process that answers so many clients with tokens a second, given a server's options."""
    given = dict(zip(*[iter(shlex.split(options))] * 2, strict=False))
    names = ("framework", "checkpoint", "dtype", "slots", "quantize")
    chosen = [given.get(f"--{name}", "") for name in names]
    with subprocess.Popen(
        [sys.executable, "-c", LOAD + program + ANSWER, *chosen, str(tokens)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip

        def ask(clients: int) -> float:
            assert process.stdin is not None
            assert process.stdout is not None
            print(clients, file=process.stdin, flush=True)
            return float(process.stdout.readline())

        try:
            yield ask
        finally:
            process.kill()


def with_prefix(url: str, name: str) -> tuple[float, float, float]:
    """Seconds to the first token behind no system part, behind a new one, and behind a kept one."""
    prefix = " ".join(f"{name} {word} came to pass" for word in range(230))  # 2,000 tokens
    asked = [[], [prefix], [prefix]]
    seconds = []
    for number, system in enumerate(asked):
        messages = [{"role": "system", "content": text} for text in system]
        messages.append({"role": "user", "content": f"{name} {number} And now?"})
        seconds.append(first_token_s(url, messages))
    return seconds[0], seconds[1], seconds[2]


def table(figures: list[dict[str, Any]]) -> Table:
    """The best of the rounds: tokens a second, also beside `stream`, and the first token."""
    shown = Table("server", "clients", "tokens/s", "x stream", "first token, ms")
    stream = next(max(row["rates"]) for row in figures if row["server"] == "stream")
    for row in figures:
        best = max(row["rates"])
        first = f"{1000 * min(row['first_s']):.0f}" if row["first_s"] else ""
        cells = f"{row['clients']}", f"{best:.1f}", f"{best / stream:.2f}", first
        shown.add_row(row["server"], *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--serve", default="", metavar="OPTIONS", help="options of the server")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--against-llamacpp", metavar="GGUF")
    parser.add_argument("--llamacpp-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--against-mlx", metavar="FOLDER", help="of Hugging Face's")
    parser.add_argument("--mlx-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--threads", type=int, default=2, help="llama.cpp's")
    parser.add_argument("--label", default="tiny-chat", help="what is measured, for the table")
    parser.add_argument("--output", type=Path, metavar="NAME", help="without suffix")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url, _ = stack.enter_context(serving(args.serve, reproducible=False))
        servers = {"recurrentgemma": url}
        if args.against_llamacpp:
            servers["llama.cpp"] = stack.enter_context(
                llama_cpp(
                    args.llamacpp_python, args.against_llamacpp, max(args.clients), args.threads
                )
            )
        if args.against_mlx:
            servers["mlx-lm"] = stack.enter_context(mlx_lm(args.mlx_python, args.against_mlx))
        own = (("stream", STREAM, [1]), ("scheduler", SCHEDULER, args.clients))
        processes = [
            (name, stack.enter_context(asked_by_line(code, args.serve, args.tokens)), clients)
            for name, code, clients in own
        ]
        rounds: dict[tuple[str, int], list[Round]] = {}
        rates: dict[tuple[str, int], list[float]] = {}
        for _ in range(args.rounds + 1):  # the first warms up
            for name, ask, numbers in processes:
                for clients in numbers:
                    rates.setdefault((name, clients), []).append(ask(clients))
            for name, at in servers.items():
                for clients in args.clients:
                    done = one_round(at, clients, args.tokens)
                    rounds.setdefault((name, clients), []).append(done)
        figures = [
            {"server": name, "clients": clients, "rates": all_[1:], "first_s": []}
            for (name, clients), all_ in rates.items()
        ]
        figures += [
            {"server": name, "clients": clients, "rates": [one.rate for one in all_[1:]],
             "first_s": [one.first_s for one in all_[1:]]}
            for (name, clients), all_ in rounds.items()
        ]  # fmt: skip
        publish(table(figures), {"label": args.label, "figures": figures}, args.output)
        several = [with_prefix(url, f"{round_}") for round_ in range(args.rounds)]
        without, cold, kept = (1000 * min(seconds) for seconds in zip(*several, strict=True))
        share = (kept - without) / (cold - without)
        print(f"first token of a chat, ms: {without:.1f}")
        print(
            f"behind 2,000 tokens of a system part: read {cold:.1f}, kept {kept:.1f}: {share:.1%}"
        )
        if args.turns:
            # Other words in each round, so that no state of another round serves it.
            several = [conversation(url, args.turns, f"{round_}") for round_ in range(args.rounds)]
            shown = " ".join(f"{1000 * min(seconds):.0f}" for seconds in zip(*several, strict=True))
            print(f"first token of turns 1 to {args.turns}, ms: {shown}")


if __name__ == "__main__":
    main()
