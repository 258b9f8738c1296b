"""Tokens a second and the time to the first token over HTTP, at 1, 8 and 32 clients in turns.

    python benchmarks/serve_speed.py --serve "--framework torch --slots 32"
    python benchmarks/serve_speed.py --serve "--checkpoint gemma3-270m/" --clients 1 8 \
        --against-llamacpp gemma-3-270m-q4_k_m.gguf --llamacpp-python PYTHON
    python benchmarks/serve_speed.py --clients 1 8 --against-mlx FOLDER --mlx-python PYTHON

Each server runs all the time; rounds of them take turns, and the best round counts. `stream` is the
sampler's own in a process of its own. The last lines are a conversation: seconds to the first token
of each turn. PYTHON is an interpreter with the wheel xllamacpp, or with mlx-lm and mlx-cpu; this
one unless you say. FOLDER is the checkpoint as `convert --to huggingface` writes it.
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
from collections.abc import Iterator
from typing import Any, NamedTuple

from serve_load import serving

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
STREAM = """
import sys, time
from recurrentgemma.cli.frameworks import choose_framework, find_checkpoint, load_sampler
from recurrentgemma.common.generation.strategies import Greedy
framework, checkpoint, dtype, tokens = sys.argv[1:]
framework = choose_framework(framework or None)
path, vocabulary = find_checkpoint(checkpoint or None, None, chat=True)
sampler = load_sampler(framework, path, vocabulary, Greedy(), dtype or None, False).sampler
for line in sys.stdin:
    stream = sampler.stream("Once upon a time", int(tokens), end_sampling_at_eos_token=False)
    next(stream)
    started = time.perf_counter()
    count = sum(1 for _ in stream)
    print(count / (time.perf_counter() - started), flush=True)
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
    """All clients at once, in one thread: reading costs little of what is measured."""
    host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
    selector, times, seen = selectors.DefaultSelector(), {}, {}
    started = time.perf_counter()
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
        client.sendall(head.encode() + content)
        selector.register(client, selectors.EVENT_READ)
        seen[client] = b""
    while selector.get_map():
        for key, _ in selector.select():
            client: Any = key.fileobj
            data = client.recv(1 << 16)
            seen[client] += data
            if client not in times and b'"text":' in seen[client]:
                times[client] = time.perf_counter() - started
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
        messages.append({"role": "assistant", "content": REPLY})
        seconds.append(first or 0.0)
    return seconds


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
def streaming(options: str, tokens: int) -> Iterator[subprocess.Popen[str]]:
    """A process that answers each line with the tokens a second of `stream`."""
    given = dict(zip(*[iter(shlex.split(options))] * 2, strict=False))
    chosen = [given.get(f"--{name}", "") for name in ("framework", "checkpoint", "dtype")]
    with subprocess.Popen(
        [sys.executable, "-c", STREAM, *chosen, str(tokens)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


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
        alone = stack.enter_context(streaming(args.serve, args.tokens))
        assert alone.stdin is not None
        assert alone.stdout is not None
        rounds: dict[tuple[str, int], list[Round]] = {}
        rates = []
        for _ in range(args.rounds + 1):  # the first warms up
            alone.stdin.write("\n")
            alone.stdin.flush()
            rates.append(float(alone.stdout.readline()))
            for name, at in servers.items():
                for clients in args.clients:
                    done = one_round(at, clients, args.tokens)
                    rounds.setdefault((name, clients), []).append(done)
        print(f"{'stream':16} {max(rates[1:]):8.1f} tokens/s")
        for (name, clients), all_ in rounds.items():
            best = max(all_[1:])
            first = min(one.first_s for one in all_[1:])
            print(
                f"{name:16} {best.rate:8.1f} tokens/s at {clients:2} clients, "
                f"first token after {1000 * first:.0f} ms"
            )
        if args.turns:
            # Other words in each round, so that no state of another round serves it.
            several = [conversation(url, args.turns, f"{round_}") for round_ in range(args.rounds)]
            shown = " ".join(f"{1000 * min(seconds):.0f}" for seconds in zip(*several, strict=True))
            print(f"first token of turns 1 to {args.turns}, ms: {shown}")


if __name__ == "__main__":
    main()
