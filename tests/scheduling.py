"""A scheduler that is turned by hand, and what a sampler gives alone."""

from typing import Any

import numpy as np

from recurrentgemma.common.generation.requests import RowRequest
from recurrentgemma.common.generation.stops import Stops
from recurrentgemma.common.generation.strategies import Categorical, Greedy, row_keys
from recurrentgemma.serve.jobs import Growth, Job
from recurrentgemma.serve.scheduler import Scheduler

LONG = "And it came to pass in those days, that there went out a decree. " * 3


class Served:
    """A scheduler that is turned by hand, and what it has delivered."""

    def __init__(self, sampler, **options: Any) -> None:
        self.tokenizer = sampler.tokenizer
        self.events: dict[Job, list[Any]] = {}
        options = {"num_slots": 4} | options  # as the servers have: programs are shared
        self.scheduler = Scheduler(sampler.engine, sampler.tokenizer, self._take, **options)

    def _take(self, pairs) -> None:
        for job, event in pairs:
            self.events.setdefault(job, []).append(event)

    def submit(self, job: Job, turns: int = 0) -> Job:
        self.scheduler.submit([job])
        self.turn(turns)
        return job

    def turn(self, turns: int) -> None:
        for _ in range(turns):
            self.scheduler.turn()

    def finish(self) -> None:
        for _ in range(2000):
            if not self.scheduler.busy:
                return
            self.scheduler.turn()
        raise AssertionError("the scheduler does not end")

    def tokens(self, job: Job) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in job.rows]
        for event in self.events[job]:
            if isinstance(event, Growth):
                rows[event.row].extend(event.tokens)
        return rows


def make_job(sampler, prompt, steps=12, strategy=None, seed=0, samples=1, **options) -> Job:
    strategy = strategy or Greedy()
    keys = row_keys([seed], 1, samples) if isinstance(strategy, Categorical) else [None] * samples
    rows = [RowRequest(steps, strategy, Stops({}, ()), key) for key in keys]
    return Job(tuple(sampler.tokenizer.encode(prompt)), rows, **options)


def alone(sampler, prompt, steps=12, strategy=None, seed=0, samples=1) -> list[list[int]]:
    out = sampler(
        [prompt],
        steps,
        sampling=strategy or Greedy(),
        rng=[seed],
        num_samples=samples,
        end_sampling_at_eos_token=False,
    )
    return [np.asarray(row).tolist() for row in out.tokens]
