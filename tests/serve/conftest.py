import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from serving import sampler_of

from recurrentgemma.common.extras import is_installed
from recurrentgemma.serve.app import Service, Settings
from recurrentgemma.serve.scheduler import Scheduler
from recurrentgemma.serve.server import Server, listen
from recurrentgemma.serve.state_cache import StateCache


@pytest.fixture(scope="session", params=["jax", "torch"])
def sampler(request) -> Any:
    """A small model with random weights, in each twin; its programs are compiled once."""
    return sampler_of(request.param)


class Running:
    """A server in a thread of this process.

    Attributes:
      url: Where it is.
      service: What answers.
    """

    def __init__(self, sampler, *, num_slots: int = 4, most_waiting: int = 64, **settings) -> None:
        def make_scheduler(deliver) -> Scheduler:
            return Scheduler(
                sampler.engine,
                sampler.tokenizer,
                deliver,
                num_slots=num_slots,
                states=StateCache(1 << 24),
                most_waiting=most_waiting,
            )

        self.sampler = sampler
        self.service = Service(make_scheduler, sampler.tokenizer, Settings("tiny", **settings))
        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        ready = threading.Event()
        self.server = Server(self.service, ready.set)
        self._thread = threading.Thread(target=self.server.run, args=([listener],))
        self.service.scheduler.start()
        self._thread.start()
        assert ready.wait(300)

    def close(self) -> None:
        self.server.drain()
        self._thread.join(60)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def running(sampler, **options: Any) -> Iterator[Running]:
    server = Running(sampler, **options)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def start():
    """Starts a server for one test: `with start(**options) as server`."""
    twin = "torch" if is_installed("torch") else "jax"  # the one that compiles less
    return lambda **options: running(sampler_of(twin), **options)


@pytest.fixture(scope="session")
def server(start) -> Iterator[Running]:
    """A server of one twin, for what both have from the same code."""
    with start() as running:
        yield running


@pytest.fixture(scope="session")
def each_server(sampler) -> Iterator[Running]:
    """A server of each twin."""
    with running(sampler) as server:
        yield server
