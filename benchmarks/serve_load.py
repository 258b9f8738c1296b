"""Many clients of a running server at once: some stream, some leave, all texts are compared.

    recurrentgemma serve --slots 8 --reproducible &
    python benchmarks/serve_load.py --clients 64 --requests 2000 --pid $!

It prints the rates, and with --pid the server's memory and open files as the load goes on. Without
--reproducible a text may differ where two tokens are equally likely up to rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
import threading
import time
import urllib.error
import urllib.request
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


def load(
    url: str, *, clients: int, requests: int, max_tokens: int = 32, leaving: float = 0.2,
    seed: int = 0, key: str = "",
) -> Report:  # fmt: skip
    """Asks for greedy and seeded texts, each known from a request alone before."""
    report, lock = Report(), threading.Lock()
    bodies = [
        {"prompt": prompt, "max_tokens": max_tokens, "seed": 1, "ignore_eos": True} | sampling
        for prompt in PROMPTS
        for sampling in ({"temperature": 0}, {"temperature": 0.8, "top_p": 0.9})
    ]
    expected = [text_of(url, body, key) for body in bodies]

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
                    if leaves and len(pieces) > 3:
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


def watch(pid: int, over: threading.Event) -> None:
    """Prints the memory and the open files of a process every ten seconds."""
    while not over.wait(10):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        print(f"{megabytes:.0f} MB, {len(os.listdir(f'/proc/{pid}/fd'))} open files", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--leaving", type=float, default=0.2, help="share that leaves early")
    parser.add_argument("--pid", type=int, help="the server's process, to watch")
    args = parser.parse_args()
    over = threading.Event()
    if args.pid is not None:
        threading.Thread(target=watch, args=(args.pid, over), daemon=True).start()
    started = time.monotonic()
    report = load(
        args.url, clients=args.clients, requests=args.requests, max_tokens=args.max_tokens,
        leaving=args.leaving, key=args.key,
    )  # fmt: skip
    over.set()
    print(report)
    print(f"{report.tokens / (time.monotonic() - started):.1f} tokens/s of complete texts")
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
