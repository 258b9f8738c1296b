"""A service at a port, from the first compiled program to the last answer."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from recurrentgemma.common.errors import UserError
from recurrentgemma.serve.app import Service

DRAIN_S = 30.0
_CLOSE_S = 2.0


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Raises:
      ValueError: There is no such address, or another program has the port.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"cannot listen at {host} port {port}: {error.strerror or error}") from None


class Server(uvicorn.Server):
    """Answers until a signal; then it takes no more requests and ends with the last answer.

    A second signal ends at once, and so does a broken engine.

    Attributes:
      forced: Whether a second signal came.
      ended: Whether the device's thread has ended.
    """

    def __init__(
        self, service: Service, on_ready: Callable[[], None], drain_s: float = DRAIN_S
    ) -> None:
        """Prepares to serve.

        Args:
          service: What answers.
          on_ready: Called once, when the first request may come.
          drain_s: Seconds that running answers have after a signal.
        """
        config = uvicorn.Config(
            service.app(),
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
        )
        super().__init__(config)
        self._service, self._on_ready, self._drain_s = service, on_ready, drain_s
        self._announced, self.forced, self.ended = False, False, False
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del frame
        if self._service.draining:
            self.forced = self.force_exit = self.should_exit = True
        self.drain()

    def drain(self) -> None:
        """Takes no more requests, and ends with the last answer."""
        self._service.draining = True
        self._drain_until = time.monotonic() + self._drain_s

    async def on_tick(self, counter: int) -> bool:
        service = self._service
        if service.ready and not self._announced:
            self._announced = True
            self._on_ready()
        until = self._drain_until
        if until is not None and not self.should_exit:
            self.should_exit = not service.num_open or time.monotonic() > until
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Answers that still run end with an error that clients can read.
        wait_s = 0.0 if self.forced else _CLOSE_S
        self.ended = await asyncio.to_thread(self._service.scheduler.close, wait_s)
        await super().shutdown(sockets)


def serve(service: Service, listener: socket.socket, on_ready: Callable[[], None]) -> int:
    """Serves until a signal. Returns the exit code: 0, or as shells report a signal."""
    server = Server(service, on_ready)
    service.scheduler.start()
    server.run([listener])
    code = 128 + signal.SIGTERM if server.forced else 0
    if not server.ended:  # the thread is compiling: waiting for it would take long
        sys.stderr.flush()
        os._exit(code)
    return code
