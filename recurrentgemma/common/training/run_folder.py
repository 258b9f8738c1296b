"""The folder of a training run, and its checkpoints, each whole or absent.

run.toml                  every option of the run, and the data's hashes
train_log.jsonl           a line a step
validation_log.jsonl      a line an evaluation
loss.png                  both
checkpoints/step-0000100  a checkpoint folder; its training/ holds the state to resume from: a
                          file, or a folder that several processes wrote
best                      a link to the checkpoint with the lowest validation loss; a file with its
                          path where the file system has no links
model                     the final checkpoint folder
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recurrentgemma.common.errors import DamagedError, DestinationError
from recurrentgemma.common.io.files import remove_partial, where_supported
from recurrentgemma.common.io.tensor_files import TensorFile, write_tensors
from recurrentgemma.common.processes import ALONE, Processes
from recurrentgemma.common.training.adapters import ADAPTERS
from recurrentgemma.common.training.packing import Position

_TRAINING, _STATE, _PROGRESS = "training", "state.safetensors", "progress.json"
_FOLDER = "state"


class Best(NamedTuple):
    """The evaluation with the lowest loss."""

    step: int
    loss: float


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
      step: The number of steps done.
      position: The position in the data stream.
      seconds: The time spent so far.
      best: The best evaluation, if there was one.
    """

    step: int
    position: Position
    seconds: float
    best: Best | None


class RunFolder:
    """The paths of a run, and its checkpoints."""

    def __init__(self, path: Path, processes: Processes = ALONE) -> None:
        self.path, self._processes = path, processes
        self.options = path / "run.toml"
        self.train_log = path / "train_log.jsonl"
        self.validation_log = path / "validation_log.jsonl"
        self.plot = path / "loss.png"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best"
        self.model = path / "model"
        self.adapters = path / ADAPTERS

    def checkpoint(self, step: int) -> Path:
        """The path of a step's checkpoint, whether it exists or not."""
        return self.checkpoints / f"step-{step:07d}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        names = [path.name for path in self.checkpoints.glob("step-*") if path.is_dir()]
        return sorted(int(name.removeprefix("step-")) for name in names)

    def clean(self) -> None:
        """Removes files and folders that a killed process left half written or half removed."""
        for folder in (self.path, self.checkpoints):
            if folder.exists():
                remove_partial(folder)

    def save(
        self,
        progress: Progress,
        arrays: Mapping[str, np.ndarray] | Callable[[Path], None],
        save_model: Callable[[Path, Path], None],
        model_size: int,
    ) -> Path:
        """Writes a checkpoint, whole or not at all; all processes must call this together.

        Args:
          progress: How far the run is.
          arrays: The arrays of the training state; or a function that all processes call, to write
            them into the folder that it is given.
          save_model: Writes the model to the folder, and adapters to the file, that it is given.
          model_size: The model's size in bytes.

        Raises:
          DiskSpaceError: The disk is, or became, full.
        """
        path = self.checkpoint(progress.step)
        together = callable(arrays)
        size = model_size + (0 if together else sum(array.nbytes for array in arrays.values()))
        with self._processes.folder(path, force=True, size=size) as folder:
            model, training = folder / "model", folder / _TRAINING
            training.mkdir(exist_ok=True)
            save_model(model, training / ADAPTERS)
            if together:
                arrays(training / _FOLDER)
            if self._processes.is_first:
                for file in model.iterdir():
                    file.rename(folder / file.name)
                model.rmdir()
                if not together:
                    write_tensors(training / _STATE, arrays, {})
                (training / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
        return path

    def load(self, step: int) -> tuple[Progress, dict[str, np.ndarray] | Path]:
        """How far the run was at a checkpoint, and the arrays of its training state, or its folder.

        Raises:
          DamagedError: The checkpoint cannot be read back.
        """
        folder = self.checkpoint(step) / _TRAINING
        try:
            fields = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
            done, position, seconds, best = fields
            progress = Progress(
                done, Position(*position), seconds, None if best is None else Best(*best)
            )
            if (folder / _FOLDER).is_dir():
                return progress, folder / _FOLDER
            file = TensorFile(folder / _STATE)
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise DamagedError(f"{folder} cannot be resumed from: {error}") from error
        return progress, {name: file.read(name) for name in file.tensors}

    def keep(self, last: int, best: Best | None) -> None:
        """Links the best checkpoint and removes all others but the `last`.

        Where the file system has no links, `best` is a file with the checkpoint's path.
        """
        steps = self.steps()
        kept = set(steps[-last:])
        if best is not None:
            kept.add(best.step)
            self._link(best.step)
        for step in set(steps) - kept:
            # Hidden first, so that nobody sees a checkpoint in part.
            hidden = self.checkpoints / f".{self.checkpoint(step).name}.removed.partial"
            self.checkpoint(step).rename(hidden)
            shutil.rmtree(hidden)

    def _link(self, step: int) -> None:
        target = os.path.relpath(self.checkpoint(step), self.path)
        if self.best.is_symlink() and os.readlink(self.best) == target:
            return
        temporary = self.path / ".best.partial"
        temporary.unlink(missing_ok=True)
        with where_supported():
            temporary.symlink_to(target, target_is_directory=True)
        if not temporary.is_symlink():
            temporary.write_text(target + "\n", encoding="utf-8")
        temporary.replace(self.best)

    def require_free(self, *, force: bool) -> None:
        """Raises `DestinationError` if a run may not begin in the folder.

        Args:
          force: Whether a new run may replace an old one.
        """
        if not self.path.exists():
            return
        if self.path.is_dir() and not self._entries():
            return
        if not self.path.is_dir() or not self.options.exists():
            raise DestinationError(f"{self.path} exists and is no folder of a training run")
        if not force:
            raise DestinationError(
                f"{self.path} holds a training run: --resume continues it, --force replaces it"
            )

    def begin(self) -> None:
        """Makes the folder, or empties it."""
        self.path.mkdir(parents=True, exist_ok=True)
        # The options go last: they mark the folder as a run's.
        for path in sorted(self._entries(), key=lambda path: path == self.options):
            _remove(path)

    def _entries(self) -> list[Path]:
        """The entries of the folder, except options that a killed process was writing."""
        unfinished = f".{self.options.name}."
        return [path for path in self.path.iterdir() if not path.name.startswith(unfinished)]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
