"""The life of a training run in either framework: steps, evaluations, checkpoints, signals."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from recurrentgemma.common.training.batch import Batch
from recurrentgemma.common.training.packing import RowStream
from recurrentgemma.common.training.run_folder import Best, Progress, RunFolder

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class NonFiniteLossError(ValueError):
    """The loss or its gradient became NaN or infinite; the message names the last checkpoint."""


class Interrupted(Exception):
    """A run was asked to stop; it left a checkpoint.

    Attributes:
      signal: The number of the signal.
      checkpoint: What it left.
    """

    def __init__(self, signal: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by signal {signal}; {checkpoint} is written")
        self.signal, self.checkpoint = signal, checkpoint


class Trainer(Protocol):
    """A model in training, in either framework.

    Attributes:
      step: Steps done.
      model_size: Bytes of the model.
    """

    model_size: int

    @property
    def step(self) -> int: ...

    def train_step(self, batches: Sequence[Batch]) -> Mapping[str, Any]:
        """One update: "loss", "tokens", "grad_norm", "learning_rate", perhaps not yet computed."""
        ...

    def evaluate(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        """The "loss", "perplexity" and "tokens" of batches."""
        ...

    def arrays(self) -> dict[str, np.ndarray]:
        """All that changes in training but the number of steps."""
        ...

    def load(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes to where `arrays` was called."""
        ...

    def save(self, path: Path, adapters: Path) -> None:
        """Writes the model as a checkpoint folder, and adapters, if it has any, as a file."""
        ...

    def sample(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """The likeliest continuations, of so many tokens at most."""
        ...

    def memory(self) -> int | None:
        """Bytes used at most so far, where that can be told."""
        ...


class Observer(Protocol):
    """Who is told what happens."""

    def stepped(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Steps were done."""
        ...

    def validated(self, entry: Mapping[str, Any]) -> None:
        """An evaluation was done."""
        ...

    def saved(self, path: Path) -> None:
        """A checkpoint was written."""
        ...


class Plan(NamedTuple):
    """How long a run is, and when what happens.

    Attributes:
      steps: Steps in all.
      batch_size: Rows a microbatch.
      accumulation: Microbatches a step.
      evaluate_every: Steps between evaluations; there is one before the first and after the last.
      checkpoint_every: Steps between checkpoints; there is one after the last step and one after
        every evaluation that is the best so far.
      log_every: Steps after which what they gave is waited for, checked and logged.
      keep: So many last checkpoints are kept beside the best.
      prompts: What the model continues at each evaluation.
      sample_tokens: By so many tokens.
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


class TrainingRun:
    """A run: its model, its data, its folder.

    Attributes:
      progress: How far it is.
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
    ) -> None:
        """Prepares a run.

        Args:
          plan: What happens when.
          trainer: The model.
          stream: What it is trained on.
          validation: What it is evaluated on; there are no evaluations if empty.
          folder: Where checkpoints go.
          observers: Who is told.
          progress: Where trainer and stream are; at their beginning if None.
        """
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
          NonFiniteLossError: The loss or its gradient is no number any more.
          Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
          CheckpointError: A checkpoint could not be written.
        """
        plan, trainer = self._plan, self._trainer
        with _stopping() as signals:
            if trainer.step == 0:
                self._evaluate()
            while trainer.step < plan.steps:
                batches = [self._stream.take(plan.batch_size) for _ in range(plan.accumulation)]
                metrics = trainer.train_step(batches)
                self._pending.append((self._describe(batches), metrics))
                step, last = trainer.step, trainer.step == plan.steps
                stops = bool(signals) and not last  # a later signal is for the next step
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
                    raise Interrupted(signals[0], self._last)

    def _describe(self, batches: Sequence[Batch]) -> dict[str, Any]:
        places = sum(int((batch.segment_pos >= 0).sum()) for batch in batches)
        epoch = self._stream.position.epoch
        return {"step": self._trainer.step, "epoch": epoch, "read": places}

    def _log(self) -> None:
        """Waits for the steps since the last time, and tells of them."""
        entries = [
            fields | {name: float(value) for name, value in metrics.items()}
            for fields, metrics in self._pending
        ]
        now = time.monotonic()
        rate = sum(entry["read"] for entry in entries) / max(now - self._logged, 1e-9)
        self._pending, self._logged = [], now
        for entry in entries:
            for name in ("loss", "grad_norm"):
                if not math.isfinite(entry[name]):
                    raise self._non_finite(f"the {name} is {entry[name]} at step {entry['step']}")
        times = {"tokens_per_second": round(rate, 1), "seconds": round(now - self._begun, 3)}
        for observer in self._observers:
            observer.stepped([entry | times for entry in entries])

    def _non_finite(self, what: str) -> NonFiniteLossError:
        if self._last is None:
            return NonFiniteLossError(f"{what}; there is no checkpoint from before")
        return NonFiniteLossError(f"{what}; the last good checkpoint is {self._last}")

    def _evaluate(self) -> bool:
        """Evaluates, tells of it; whether the model is the best so far."""
        if not self._validation:
            return False
        trainer, plan = self._trainer, self._plan
        entry = {"step": trainer.step, **trainer.evaluate(self._validation)}
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
        self._logged = time.monotonic()  # the rate is that of training alone
        return best

    def _save(self) -> None:
        trainer, folder = self._trainer, self._folder
        self._last = folder.save(self.progress, trainer.arrays(), trainer.save, trainer.model_size)
        folder.keep(self._plan.keep, self._best)
        for observer in self._observers:
            observer.saved(self._last)
        self._logged = time.monotonic()


@contextlib.contextmanager
def _stopping() -> Iterator[list[int]]:
    """The signals that asked to stop; a second one is as it was before."""
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
