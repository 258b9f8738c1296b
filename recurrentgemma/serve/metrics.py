"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from recurrentgemma.serve.scheduler import Scheduler

_PREFIX = "recurrentgemma_"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class _OfScheduler(Collector):
    """What the scheduler counts, read when somebody asks."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Any]:
        scheduler = self._scheduler
        counts, states = scheduler.counts, scheduler.states
        gauges = {
            "rows_running": ("Rows in slots", len(scheduler.slots.active)),
            "jobs_waiting": ("Prompts that wait", scheduler.num_waiting),
            "state_cache_bytes": ("Bytes of kept states", states.nbytes if states else 0),
            "state_cache_states": ("Kept states", len(states) if states else 0),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(_PREFIX + name, text, value)
        totals = {
            "prompt_tokens": ("Tokens of prompts that were read", counts.prompt_tokens),
            "cached_tokens": ("Tokens that kept states had read", counts.cached_tokens),
            "generated_tokens": ("Tokens that were generated", counts.generated_tokens),
            "steps": ("Steps of the batch", counts.steps),
            "preemptions": ("Rows that gave way to others", counts.preemptions),
        }
        for name, (text, value) in totals.items():
            yield CounterMetricFamily(_PREFIX + name, text, value)
        ended = CounterMetricFamily(_PREFIX + "rows", "Rows that ended", labels=["reason"])
        for reason, number in [*counts.rows.items()]:
            ended.add_metric([reason], number)
        yield ended


class Metrics:
    """The numbers of one server.

    Attributes:
      requests: Requests by path and status.
      first_token: Seconds to the first token.
      duration: Seconds of a whole answer.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfScheduler(scheduler))
        self.requests = Counter(
            _PREFIX + "requests", "Requests", ["path", "status"], registry=self._registry
        )
        self.first_token = Histogram(
            _PREFIX + "first_token_seconds",
            "Seconds to the first token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.duration = Histogram(
            _PREFIX + "request_seconds",
            "Seconds of a whole answer",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All numbers in Prometheus' format."""
        return generate_latest(self._registry)
