"""A training run in either framework: steps, evaluations, checkpoints, signals."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.processes import ALONE, Processes
from recurrentgemma.common.training.batch import Batch
from recurrentgemma.common.training.packing import RowStream
from recurrentgemma.common.training.run_folder import Best, Progress, RunFolder
from recurrentgemma.common.training.trainer import Trainer

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class NonFiniteLossError(UserError):
    """The loss or its gradient became NaN or infinite; the message names the last checkpoint."""


class Interrupted(Exception):
    """A signal stopped the run, which wrote a checkpoint first.

    Attributes:
      signal: The number of the signal.
      checkpoint: The checkpoint's folder.
    """

    def __init__(self, signal: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by signal {signal}; {checkpoint} is written")
        self.signal, self.checkpoint = signal, checkpoint


class Observer(Protocol):
    """A listener of a training run."""

    def stepped(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Called after steps."""
        ...

    def validated(self, entry: Mapping[str, Any]) -> None:
        """Called after an evaluation."""
        ...

    def saved(self, path: Path) -> None:
        """Called after a checkpoint is written."""
        ...


class Plan(NamedTuple):
    """The length of a run, and its schedule.

    Attributes:
      steps: Steps in all.
      batch_size: Rows in a microbatch.
      accumulation: Microbatches in a step.
      evaluate_every: Steps between evaluations. The run also evaluates before the first step and
        after the last.
      checkpoint_every: Steps between checkpoints. The run also writes one after the last step, and
        after every evaluation that is the best so far.
      log_every: Steps between waits for the results, which are then checked and logged.
      keep: How many of the last checkpoints to keep beside the best.
      prompts: The prompts that the model continues at each evaluation.
      sample_tokens: How many tokens to continue each prompt with.
      skip_nonfinite: Whether the run goes on after a step whose loss or gradient is NaN or
        infinite, which the trainer then skips; the run ends if not.
    """

    steps: int
    batch_size: int
    accumulation: int
    evaluate_every: int
    checkpoint_every: int
    log_every: int
    keep: int
    prompts: Sequence[str]
    sample_tokens: int
    skip_nonfinite: bool = False


class TrainingRun:
    """A training run: a model, its data, a folder.

    Attributes:
      progress: How far the run is.
    """

    def __init__(
        self,
        plan: Plan,
        trainer: Trainer,
        stream: RowStream,
        validation: Sequence[Batch],
        folder: RunFolder,
        observers: Sequence[Observer],
        progress: Progress | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Prepares a run.

        Args:
          plan: The schedule.
          trainer: The model.
          stream: The rows to train on.
          validation: The batches to evaluate on; no evaluations if empty.
          folder: The folder for checkpoints.
          observers: The listeners.
          progress: Where trainer and stream are; at their beginning if None.
          processes: The processes that train together; all have the whole stream, and each takes
            its rows of every batch.
        """
        self._processes = processes
        self._plan, self._trainer, self._stream = plan, trainer, stream
        self._validation, self._folder, self._observers = validation, folder, observers
        self._best = None if progress is None else progress.best
        self._begun = time.monotonic() - (0.0 if progress is None else progress.seconds)
        self._last = None if progress is None else folder.checkpoint(progress.step)
        self._pending: list[tuple[dict[str, Any], Mapping[str, Any]]] = []
        self._logged = time.monotonic()

    @property
    def progress(self) -> Progress:
        seconds = time.monotonic() - self._begun
        return Progress(self._trainer.step, self._stream.position, seconds, self._best)

    def __call__(self) -> None:
        """Trains to the end.

        Raises:
          NonFiniteLossError: The loss or its gradient is NaN or infinite.
          Interrupted: SIGINT or SIGTERM came; the run finished the step and wrote a checkpoint.
          CheckpointError: A checkpoint could not be written.
        """
        plan, trainer = self._plan, self._trainer
        with _stopping() as signals:
            if trainer.step == 0:
                self._evaluate()
            while trainer.step < plan.steps:
                batches = [self._stream.take(plan.batch_size) for _ in range(plan.accumulation)]
                metrics = trainer.train_step([self._processes.rows(batch) for batch in batches])
                self._pending.append((self._describe(batches), metrics))
                step, last = trainer.step, trainer.step == plan.steps
                number = max(self._processes.everyone(signals[0] if signals else 0))
                stops = bool(number) and not last  # a later signal stops the next step
                evaluates = bool(self._validation) and (last or step % plan.evaluate_every == 0)
                saves = last or stops or step % plan.checkpoint_every == 0
                if evaluates or saves or step % plan.log_every == 0:
                    self._log()
                if evaluates:
                    saves |= self._evaluate()
                if saves:
                    self._save()
                if stops:
                    assert self._last is not None
                    raise Interrupted(number, self._last)

    def _describe(self, batches: Sequence[Batch]) -> dict[str, Any]:
        places = sum(int((batch.segment_pos >= 0).sum()) for batch in batches)
        epoch = self._stream.position.epoch
        return {"step": self._trainer.step, "epoch": epoch, "read": places}

    def _log(self) -> None:
        """Waits for the steps since the last call, checks them and reports them."""
        entries = [
            fields | {name: float(value) for name, value in metrics.items()}
            for fields, metrics in self._pending
        ]
        now = time.monotonic()
        rate = sum(entry["read"] for entry in entries) / max(now - self._logged, 1e-9)
        self._pending, self._logged = [], now
        for entry in entries:
            wrong = [n for n in ("loss", "grad_norm") if not math.isfinite(entry[n])]
            if wrong and not self._plan.skip_nonfinite:
                name = wrong[0]
                raise self._non_finite(f"the {name} is {entry[name]} at step {entry['step']}")
            if wrong:
                skipped = {"skipped": f"the {wrong[0]} is {entry[wrong[0]]}"}
                entry.update(skipped, **dict.fromkeys(wrong))  # JSON has no NaN
        times = {"tokens_per_second": round(rate, 1), "seconds": round(now - self._begun, 3)}
        for observer in self._observers:
            observer.stepped([entry | times for entry in entries])

    def _non_finite(self, what: str) -> NonFiniteLossError:
        if self._last is None:
            return NonFiniteLossError(f"{what}; there is no checkpoint from before")
        return NonFiniteLossError(f"{what}; the last good checkpoint is {self._last}")

    def _evaluate(self) -> bool:
        """Evaluates and reports; returns whether the model is the best so far."""
        if not self._validation:
            return False
        trainer, plan = self._trainer, self._plan
        own = [self._processes.rows(batch) for batch in self._validation]
        entry = {"step": trainer.step, **trainer.evaluate(own)}
        texts = trainer.sample(plan.prompts, plan.sample_tokens) if plan.prompts else []
        entry["samples"] = [
            {"prompt": prompt, "text": text}
            for prompt, text in zip(plan.prompts, texts, strict=True)
        ]
        for observer in self._observers:
            observer.validated(entry)
        best = trainer.step > 0 and (self._best is None or entry["loss"] < self._best.loss)
        if best:
            self._best = Best(trainer.step, entry["loss"])
        self._logged = time.monotonic()  # the rate counts training alone
        return best

    def _save(self) -> None:
        trainer, folder, processes = self._trainer, self._folder, self._processes
        arrays = trainer.arrays() if processes.count == 1 else trainer.write_state
        self._last = folder.save(self.progress, arrays, trainer.save, trainer.model_size)
        processes.by_first(lambda: folder.keep(self._plan.keep, self._best))
        for observer in self._observers:
            observer.saved(self._last)
        self._logged = time.monotonic()


@contextlib.contextmanager
def _stopping() -> Iterator[list[int]]:
    """Collects the signals that ask to stop; a second signal has its usual effect."""
    got: list[int] = []

    def note(number: int, _: object) -> None:
        got.append(number)
        restore()

    before = {number: signal.signal(number, note) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield got
    finally:
        restore()
