"""The processes that run one command together, each with its rows of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.io.files import whole_folder
from recurrentgemma.common.training.batch import Batch

_T = TypeVar("_T")


class OtherProcessError(UserError, RuntimeError):
    """Another process of a run failed; the message has its number and its error."""


class Processes:
    """A process alone; each twin has a class for several.

    All processes call every method together.

    Attributes:
      index: The number of this process, from 0.
      count: How many there are.
    """

    index = 0
    count = 1

    @property
    def row_parts(self) -> tuple[list[int], int]:
        """Which equal parts of a batch's rows this process takes, and how many there are."""
        return [self.index], self.count

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.index == 0

    def everyone(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        return [value]

    @contextlib.contextmanager
    def folder(self, path: Path, *, force: bool = False, size: int = 0) -> Iterator[Path]:
        """`whole_folder` for all: they write into one temporary folder, and the first renames it.

        The folder must be on a disk that all processes see. If the block fails in one process,
        `path` is as it was before.
        """
        with contextlib.ExitStack() as stack:
            folder = self.by_first(
                lambda: stack.enter_context(whole_folder(path, force=force, size=size))
            )
            folder, error = self.everyone(folder)[0], None
            try:
                yield folder
            except BaseException as raised:
                error = raised
            self.agree(error)
            self.by_first(lambda: stack.pop_all().close())  # gives the folder its name

    def lost(self, error: Exception) -> str | None:
        """The reason that a framework gives for the loss of another process, if this is one."""
        del error
        return None

    def by_first(self, function: Callable[[], _T]) -> _T | None:
        """What a function returns in the first process; in the others it does not run: None.

        Raises:
          OtherProcessError: It raised an error, which is raised in the first process itself.
        """
        result, error = None, None
        if self.is_first:
            try:
                result = function()
            except BaseException as raised:  # also Ctrl-C: the others wait
                error = raised
        self.agree(error)
        return result

    def agree(self, error: BaseException | None) -> None:
        """Raises the error of this process, or `OtherProcessError` for that of another.

        Args:
          error: The error; None if there was none.
        """
        said = None if error is None else f"{type(error).__name__}: {error}"
        found = self.everyone(said)
        if error is not None:
            raise error
        for index, problem in enumerate(found):
            if problem is not None:
                raise OtherProcessError(f"process {index} failed: {problem}")

    def require_same(self, what: str, values: dict[str, Any]) -> None:
        """Raises `ValueError` if processes disagree; the message names the values that differ.

        Args:
          what: What the values are.
          values: The values of this process, by name.
        """
        everyone = self.everyone(values)
        first = everyone[0]
        differing = [
            f"{name} is {first.get(name)!r} in process 0 and {other.get(name)!r} in process {index}"
            for index, other in enumerate(everyone)
            for name in {**first, **other}
            if first.get(name) != other.get(name)
        ]
        if differing:
            raise UserError(f"the processes must have the same {what}: {'; '.join(differing)}")

    def rows(self, batch: Batch) -> Batch:
        """This process's rows of a batch of NumPy's arrays that all processes have.

        Rows without weight are added where they do not divide into equal parts.
        """
        own, parts = self.row_parts
        if parts == 1:
            return batch
        each = -(-len(batch.tokens) // parts)
        index = [min(i, len(batch.tokens) - 1) for i in range(each * parts)]
        added = Batch(*(z[index] for z in batch))
        added.weights[len(batch.tokens) :] = 0
        rows = [row for part in own for row in range(part * each, (part + 1) * each)]
        return Batch(*(z[rows] for z in added))


ALONE = Processes()
