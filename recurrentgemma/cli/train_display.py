"""Observers of a training run: its logs, the terminal, the plot, TensorBoard."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from recurrentgemma.common.errors import MissingExtraError
from recurrentgemma.common.training.logs import LogFile
from recurrentgemma.common.training.loss_plot import draw

if TYPE_CHECKING:
    from recurrentgemma.common.training.run_folder import RunFolder

_SHOWN = 200  # characters of a sample


class Observer:
    """An observer that does nothing."""

    def stepped(self, entries: Sequence[Mapping[str, Any]]) -> None:
        del entries

    def validated(self, entry: Mapping[str, Any]) -> None:
        del entry

    def saved(self, path: Path) -> None:
        del path

    def close(self) -> None:
        """Called when the run is over."""

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


class Logs(Observer):
    """`train_log.jsonl` and `validation_log.jsonl`."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        self._train, self._validation = (
            LogFile(path, step) for path in (folder.train_log, folder.validation_log)
        )

    def stepped(self, entries: Sequence[Mapping[str, Any]]) -> None:
        for entry in entries:
            self._train.write(entry)

    def validated(self, entry: Mapping[str, Any]) -> None:
        self._validation.write(entry)

    def close(self) -> None:
        self._train.close()
        self._validation.close()


class Plot(Observer):
    """`loss.png`, drawn at each checkpoint from the logs."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def saved(self, path: Path) -> None:
        draw(self._folder.plot, {"": self._folder})


class TensorBoard(Observer):
    """Event files for TensorBoard."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        """Opens the files.

        Raises:
          MissingExtraError: tensorboardX is not installed.
        """
        require_tensorboard()
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder.tensorboard), purge_step=step + 1)

    def stepped(self, entries: Sequence[Mapping[str, Any]]) -> None:
        for entry in entries:
            names = ("loss", "grad_norm", "learning_rate", "tokens_per_second")
            for name in names if "skipped" not in entry else ():
                self._writer.add_scalar(f"train/{name}", entry[name], entry["step"])

    def validated(self, entry: Mapping[str, Any]) -> None:
        for name in ("loss", "perplexity"):
            self._writer.add_scalar(f"validation/{name}", entry[name], entry["step"])
        for number, sample in enumerate(entry["samples"]):
            text = f"**{sample['prompt']}**{sample['text']}".replace("\n", "  \n")  # Markdown's
            self._writer.add_text(f"sample/{number}", text, entry["step"])

    def close(self) -> None:
        self._writer.close()


def require_tensorboard() -> None:
    """Raises `MissingExtraError` if tensorboardX is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise MissingExtraError("--tensorboard", "tensorboardX", "'recurrentgemma[train]'")


class Terminal(Observer):
    """Progress on stderr: a bar in a terminal, otherwise a line now and then."""

    def __init__(self, steps: int, done: int, memory: Callable[[], int | None]) -> None:
        """Begins.

        Args:
          steps: Steps in total.
          done: Steps done before.
          memory: Returns the bytes in use.
        """
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._steps, self._first, self._memory = steps, done, memory
        self._begun = time.monotonic()
        self._spoken = 0.0
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("compiling", total=steps, completed=done)

    def stepped(self, entries: Sequence[Mapping[str, Any]]) -> None:
        for entry in entries:
            if "skipped" in entry:
                self._say(f"step {entry['step']} skipped: {entry['skipped']}")
        entry = entries[-1]
        if entry["loss"] is None:
            return
        step = entry["step"]
        now = time.monotonic()
        left = (now - self._begun) / max(step - self._first, 1) * (self._steps - step)
        memory = self._memory()
        parts = [
            f"loss {entry['loss']:.4f}",
            f"{entry['tokens_per_second']:,.0f} tokens/s",
            *([] if memory is None else [f"{memory / 1e9:.2f} GB"]),
            f"{_duration(left)} left",
        ]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=", ".join(parts))
        elif now - self._spoken >= 1 or step == self._steps:
            self._spoken = now
            self._say(f"step {step}/{self._steps}: {', '.join(parts)}")

    def validated(self, entry: Mapping[str, Any]) -> None:
        self._say(
            f"step {entry['step']}: validation loss {entry['loss']:.4f}, "
            f"perplexity {entry['perplexity']:.2f}"
        )
        for number, sample in enumerate(entry["samples"], 1):
            text = (sample["prompt"] + sample["text"])[:_SHOWN]
            self._say(f"  {number}  " + text.replace("\n", "\n     "))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _say(self, line: str) -> None:
        if self._bar is None:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        else:
            self._console.print(line, markup=False)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
