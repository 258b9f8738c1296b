"""The command line in processes of their own, forked from one that has imported the frameworks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SERVER = """
import contextlib, importlib, json, os, resource, sys

sys.dont_write_bytecode = True  # which a limited file size would cut short
from recurrentgemma.cli import main

import recurrentgemma_conversion

for name in ("jax.training", "torch.training"):
    with contextlib.suppress(ImportError):
        importlib.import_module(f"recurrentgemma.{name}")

def run(args, folder, env, out, err, file_size):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for stream, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, flags if stream else os.O_RDONLY), stream)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    code = main(args)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # taking both frameworks down takes longer than many a command

for line in sys.stdin:
    request = json.loads(line)
    if "module" in request:
        os.environ.update(request["env"])
        importlib.import_module(request["module"])
        reply = None
    elif "poll" in request:
        ended, status = os.waitpid(request["poll"], os.WNOHANG)
        reply = os.waitstatus_to_exitcode(status) if ended else None
    else:
        reply = os.fork()
        if not reply:
            run(**request)
    print(json.dumps(reply), flush=True)
"""


class ForkServer:
    """Starts commands in a hundredth of the time that importing the frameworks takes."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        command = [sys.executable, "-c", SERVER]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.__exit__(None, None, None)  # its input ends, and so does it

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def import_module(self, name: str, env: Mapping[str, str]) -> None:
        """Imports a module once, in an environment, for all that is forked later."""
        self.ask({"module": name, "env": dict(env)})

    def start(
        self,
        *args: str | os.PathLike[str],
        cwd: Path | None = None,
        env: Mapping[str, str] = os.environ,
        file_size: int | None = None,
    ) -> Forked:
        """Runs `recurrentgemma` with arguments; it may write files of so many bytes."""
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        pid = self.ask(
            {
                "args": [os.fspath(arg) for arg in args],
                "folder": str(cwd or Path.cwd()),
                "env": dict(env),
                "out": str(out),
                "err": str(err),
                "file_size": file_size,
            }
        )
        return Forked(self, pid, out, err)

    def run(self, *args: str | os.PathLike[str], **kwargs: Any) -> Forked:
        """A command that has ended."""
        process = self.start(*args, **kwargs)
        process.wait()
        return process


class Forked:
    """A process of a `ForkServer`, as of `subprocess`; `stdout` and `stderr` are what it said."""

    def __init__(self, server: ForkServer, pid: int, out: Path, err: Path) -> None:
        self.pid, self.returncode = pid, None
        self._server, self._out, self._err = server, out, err

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise AssertionError(f"still running after {timeout} s: {self.stderr}")
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)
