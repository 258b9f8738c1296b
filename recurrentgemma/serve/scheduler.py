"""Which prompt is read next and which row has a slot; one thread owns the device."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.generation.engine import Engine
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma.serve.jobs import Event, Failed, Job, PromptRead, SlotRow
from recurrentgemma.serve.reading import PromptReading, Reader
from recurrentgemma.serve.rows import Held
from recurrentgemma.serve.slots import Slots, batch_sizes
from recurrentgemma.serve.state_cache import LEAST_TOKENS, StateCache

LOG = logging.getLogger("recurrentgemma.serve")
FEW = 8  # rows
MOST_CHUNKS = 8  # between two steps, of the length that is read beside steps
Deliver = Callable[[list[tuple[Job, Event]]], None]


class FullError(UserError):
    """Too many prompts wait already."""


class StoppedError(RuntimeError):
    """The engine raised an error, or the server ends: nothing is generated any more."""


@dataclasses.dataclass
class Counts:
    """What was done since the start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    rows: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class Scheduler:
    """Rows of many jobs in one running batch.

    A turn reads a chunk, of one prompt or of several, or more where more rows wait than grow. It
    fills the free slots and makes one step, or more where nobody waits for the turn's end. Jobs
    come from any thread; all else happens in the thread that calls `turn`, which `start` makes.

    Attributes:
      engine: What runs the model.
      slots: The running batch.
      counts: What was done since the start.
      error: What ended the scheduler; None while it works.
      ready: Whether the programs are compiled.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        deliver: Deliver,
        *,
        num_slots: int = 8,
        reproducible: bool = False,
        capacity: int | None = None,
        states: StateCache | None = None,
        most_waiting: int = 128,
        hold_s: float = 0.0,
    ) -> None:
        """Prepares to serve.

        Args:
          engine: What runs the model.
          tokenizer: Its tokenizer.
          deliver: Takes what became of jobs, once a turn; it must not wait.
          num_slots: How many rows grow at a time.
          reproducible: Whether no bit of a row depends on what else runs or is kept: every step has
            all slots, every chunk ends at a multiple of one length, and so do the kept states.
          capacity: Tokens that a row has room for, in a model whose state grows with the text.
          states: Where states are kept; None keeps no state.
          most_waiting: How many jobs may wait.
          hold_s: Seconds for which a row's new tokens are held back while steps follow: telling a
            client of one costs about as much as of several. More than `FEW` rows wait twice as
            long. First and last tokens do not wait.
        """
        self.engine, self._tokenizer, self._deliver = engine, tokenizer, deliver
        sizes = (num_slots,) if reproducible else batch_sizes(num_slots)
        self.slots = Slots(engine, sizes, capacity, bursts=bool(hold_s) and not reproducible)
        self._num_slots, self._capacity = num_slots, capacity
        self.states = states
        self._most_waiting = most_waiting
        # The first is for chunks beside a step: on an accelerator a longer one costs no more.
        beside = engine.prefill_chunks[-1 if engine.burst == 1 else -2]
        self._chunks = beside, beside if reproducible else engine.prefill_chunks[0]
        self._grid = beside if reproducible else 1
        self._reader = Reader(engine, capacity, beside, num_slots, together=not reproducible)
        self._hold_s, self._due = hold_s, 0.0
        self.counts = Counts()
        self.error: Exception | None = None
        self.ready = False
        self._changed = threading.Condition()
        self._inbox: list[Job] = []
        self._waiting: list[Job] = []
        self._reading: list[PromptReading] = []
        self._ready: list[SlotRow] = []
        self._events: list[tuple[Job, Event]] = []
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def failed(self) -> bool:
        """Whether the engine raised an error."""
        return self.error is not None and not self._closing

    @property
    def num_waiting(self) -> int:
        """How many jobs wait for a slot."""
        return len(self._inbox) + len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a job is not done."""
        work = self._inbox, self._waiting, self._reading, self._ready, self.slots.active
        return any(work)

    def submit(self, jobs: Sequence[Job], wake: bool = True) -> None:
        """Adds jobs, all or none; `deliver` gets what becomes of them.

        Args:
          jobs: The jobs.
          wake: Whether to begin now if nothing runs, or only when `wake` is called.

        Raises:
          FullError: Too many wait already.
          StoppedError: Nothing is generated any more.
        """
        with self._changed:
            if self.error is not None or self._closing:
                raise StoppedError("the engine has stopped")
            if self.num_waiting + len(jobs) > self._most_waiting + self.slots.free:
                raise FullError(
                    f"at most {self._most_waiting} prompts may wait, and {self.num_waiting} do"
                )
            self._inbox += jobs
        if wake:
            self.wake()

    def wake(self) -> None:
        """Begins with the jobs that were added, if nothing runs."""
        with self._changed:
            self._changed.notify()

    def start(self) -> None:
        """Compiles and serves, in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def close(self, wait_s: float | None = None) -> bool:
        """Ends the thread; jobs that are not done fail.

        Args:
          wait_s: Seconds to wait for the thread, which may be compiling; None waits to its end.

        Returns:
          Whether the thread has ended.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is None:
            return True
        self._thread.join(wait_s)
        if self._thread.is_alive():
            self._fail(StoppedError("the server ends"))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.prepare()
            while self._wait():
                self.turn()
        except Exception as error:
            LOG.exception("the engine has stopped")
            self._fail(error)
            return
        self._fail(StoppedError("the server ends"))

    def prepare(self) -> None:
        """Compiles all programs, so that no request waits for one."""
        self.slots.prepare(self._reader.widths)
        self._reader.prepare()
        if self.engine.pads_chunks and self._capacity is not None and self.states is not None:
            for tokens in range(1, self._capacity, self.engine.capacity_for(1) or 1):
                state = self.engine.begin(1, self._capacity)
                state = self.engine.resized(state, self.engine.capacity_for(tokens))
                self.engine.grow(self.engine.snapshot(state), self._capacity)
        self.ready = True

    def _wait(self) -> bool:
        """Waits for work; False where the scheduler is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self.busy or self._closing)
            return not self._closing

    def _fail(self, error: Exception) -> None:
        """Tells all jobs that nothing comes any more."""
        with self._changed:
            self.error = error
            held = [*self._inbox, *self._waiting, *(reading.job for reading in self._reading)]
            held += [row.job for row in (*self._ready, *self.slots.active)]
            for work in (self._inbox, self._waiting, self._reading, self._ready):
                work.clear()
        self._tell(everything=True)
        self._deliver([*self._events, *((job, Failed(error)) for job in dict.fromkeys(held))])

    def turn(self) -> None:
        """Reads prompts, fills the slots and makes one step."""
        self._take_in()
        self._begin_reading()
        self._read_chunks()
        self._fill_slots()
        self._grow()
        self._tell()
        events, self._events = self._events, []
        if events:
            self._deliver(events)

    def _take_in(self) -> None:
        """Takes in new jobs and drops those that nobody waits for."""
        with self._changed:
            new, self._inbox = self._inbox, []
            for job in new:
                bisect.insort(self._waiting, job, key=lambda job: job.rank)
        self._waiting = [job for job in self._waiting if not job.cancelled]
        self._reading = [reading for reading in self._reading if not reading.job.cancelled]
        self._ready = [row for row in self._ready if not row.job.cancelled]
        for row in self.slots.active:
            if row.job.cancelled:
                self.counts.rows["cancelled"] += 1
                self.slots.leave(row)

    def _begin_reading(self) -> None:
        """Begins to read the prompts that can have a slot soon, or another job's slot."""
        while self._waiting:
            job = self._waiting[0]
            ahead = [row.job for row in (*self.slots.active, *self._ready)]
            ahead += [reading.job for reading in self._reading]
            if sum(other.priority <= job.priority for other in ahead) >= self._num_slots:
                return
            self._waiting.pop(0)
            cached, state = 0, None
            if self.states is not None and not job.scored:
                cached, state = self.states.find(job.salt, job.tokens[:-1])
            if state is not None:
                state = Held(state, shared=True)
            self.counts.cached_tokens += cached
            self._reading.append(PromptReading(job, cached, state, self._grid))

    def _read_chunks(self) -> None:
        """Reads a chunk, or more where more rows wait for their prompts than grow.

        Growing rows wait for each chunk, and waiting rows begin to grow sooner. Prompts that are
        less urgent than a growing row do not count.
        """
        beside, alone = self._chunks
        growing, unfinished = self.slots.active, self._unfinished
        least = min((row.job.priority for row in growing), default=math.inf)
        waiting = sum(len(r.job.rows) for r in unfinished if r.job.priority <= least)
        times = waiting // len(growing) if growing else 1  # first tokens come soon
        left = beside * max(1, min(times, MOST_CHUNKS))
        while unfinished and left > 0:
            nobody_waits = not growing and len(unfinished) == len(self._reading)
            longest = alone if nobody_waits else min(alone, max(left, beside))
            left -= self._read_chunk(unfinished, longest)
            unfinished = self._unfinished
        self._end_reading()

    @property
    def _unfinished(self) -> list[PromptReading]:
        return [reading for reading in self._reading if reading.num_left]

    def _read_chunk(self, unfinished: Sequence[PromptReading], longest: int) -> int:
        """Reads a chunk of the prompts that are done first, or have waited for long.

        Returns:
          How many tokens it has read.
        """
        beside, _ = self._chunks

        def order(reading: PromptReading) -> tuple[int, int]:
            return reading.job.priority, reading.num_left // beside - reading.waited

        before = {reading: reading.at for reading in unfinished}
        for reading in unfinished:
            reading.waited += 1
        count = 0
        for reading in self._reader.read(sorted(unfinished, key=order), longest):
            reading.waited = 0
            count += reading.at - before[reading]
            keeps = self.states is not None and reading.at in reading.marks
            if keeps and reading.state is not None:
                self._keep(reading.job, reading.at, reading.state.copied(self.engine))
        self.counts.prompt_tokens += count
        return count

    def _end_reading(self) -> None:
        """Makes rows of the prompts that are read."""
        for reading in [reading for reading in self._reading if not reading.num_left]:
            self._reading.remove(reading)
            job = reading.job
            self._events.append((job, PromptRead(reading.cached, reading.scores)))
            for index in range(len(job.rows)):
                state = reading.state or Held(self._reader.empty, shared=True)
                row = SlotRow(job, index, self._tokenizer, state)
                bisect.insort(self._ready, row, key=lambda row: row.job.rank)

    def _fill_slots(self) -> None:
        """Gives ready rows the free slots, and the slots of rows with a higher priority number."""
        entering: list[SlotRow] = []
        while self._ready:
            row = self._ready[0]
            if len(entering) == self.slots.free:
                last = self._preempted(row)
                if last is None:
                    break
                self._tell_of(last)
                last.state = Held(self.slots.leave(last, keep=True))
                bisect.insort(self._ready, last, key=lambda row: row.job.rank)
                self.counts.preemptions += 1
            self._ready.remove(row)
            entering.append(row)
        if entering:
            self.slots.enter(entering)

    def _preempted(self, row: SlotRow) -> SlotRow | None:
        """The row that gives its slot to another, which has a lower priority number, if any."""
        last = max(self.slots.active, key=lambda row: row.job.rank, default=row)
        return last if last.job.priority > row.job.priority else None

    def _grow(self) -> None:
        """Makes steps until somebody waits for what comes after them, or for the tokens."""
        while self.slots.active:
            held = self._step()
            if not held or self._is_awaited() or time.monotonic() >= self._due:
                return

    def _tell(self, everything: bool = False) -> None:
        """Makes events of the tokens that were held back long enough, and of first ones."""
        now = time.monotonic()
        due = everything or now >= self._due
        for row in self.slots.active:
            if due or not row.num_told:
                self._tell_of(row)
        if due:
            few = len(self.slots.active) <= FEW
            self._due = now + self._hold_s * (1 if few else 2)

    def _tell_of(self, row: SlotRow) -> None:
        if row.num_told < len(row.generated) and not row.job.cancelled:
            self._events.append((row.job, row.told()))

    def _is_awaited(self) -> bool:
        """Whether there is other work than to go on with the same rows."""
        free = self._waiting and self.slots.free
        new = self._inbox or self._reading or self._ready or free or self._closing
        return bool(new) or any(row.job.cancelled for row in self.slots.active)

    def _step(self) -> bool:
        """Makes a step, or a burst of them; whether its tokens may be held back."""
        engine, slots = self.engine, self.slots
        burst = slots.burst if self._hold_s and not self._is_awaited() else engine.burst
        held = all(row.generated for row in slots.active)
        self.counts.steps += burst
        before = sum(len(row.generated) for row in slots.active)
        failed = slots.step(burst)
        self.counts.generated_tokens += sum(len(row.generated) for row in slots.active) - before
        for row, error in failed:
            self._tell_of(row)
            self._events.append((row.job, Failed(error)))
            row.left, row.job.cancelled = 0, True
        for row in slots.active:
            if not row.left:
                held = False
                self._tell_of(row)
                ended = "failed" if row.job.cancelled else row.text.finish_reason
                self.counts.rows[ended] += 1
                state = self.slots.leave(row, keep=self._is_worth_keeping(row))
                if state is not None:
                    self._keep(row.job, row.num_read, state, row.generated)
        slots.shrink()
        return held

    def _is_worth_keeping(self, row: SlotRow) -> bool:
        """Whether a later prompt may begin with what the row has read: its text spells its tokens.

        Jobs without marks keep nothing. Reading a reply in chunks and growing it token by token
        round differently, so that only a prompt's states are kept where every bit counts.
        """
        if self.states is None or not row.job.marks or not row.exact or row.job.cancelled:
            return False
        if self._grid > 1:
            return False
        if row.text.finish_reason == "stop_string":  # the client never sees all of the text
            return False
        new = row.tokens[len(row.job.tokens) : row.num_read]
        text = self._tokenizer.decode(new)
        return self._tokenizer.encode(text, allow_control_tokens=False)[1:] == new

    def _keep(
        self, job: Job, length: int, state: Any, generated: Sequence[int] = ()
    ) -> None:  # fmt: skip
        """Keeps the state after the first tokens of a prompt, with what was generated behind it."""
        if self.states is None or length < LEAST_TOKENS:
            return
        engine = self.engine
        fitting = engine.resized(state, engine.capacity_for(length))
        if fitting is not state:  # it may be a part of a larger array
            state = engine.snapshot(fitting)
        nbytes = sum(value.nbytes for block in state.values() for value in block)
        tokens = (*job.tokens, *generated)[:length]
        self.states.keep(job.salt, tokens, state, nbytes)
