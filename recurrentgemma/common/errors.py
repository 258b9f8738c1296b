"""What can be wrong with a checkpoint, each by a name of its own."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint, or a request about one, that cannot be served. Nothing was written."""


class UnknownFormatError(CheckpointError):
    """The path holds no checkpoint of a known format, or more than one."""


class PathError(CheckpointError):
    """A library that a format needs cannot open what has this name."""


class DamagedError(CheckpointError):
    """A file is cut short, or is not what its kind of file must be."""


class UnsafePickleError(CheckpointError):
    """A pickle wants to run code, or holds more than tensors."""


class MismatchError(CheckpointError):
    """Tensors are missing, unexpected or of a wrong shape or dtype: all of them are listed."""

    def __init__(self, what: str, problems: Sequence[str]) -> None:
        listed = "\n  ".join(problems)
        count = "1 difference" if len(problems) == 1 else f"{len(problems)} differences"
        super().__init__(f"{what} ({count}):\n  {listed}")


class NonFiniteError(CheckpointError):
    """Tensors hold NaN or infinity: all of them are named."""


class NotRecurrentGemmaError(CheckpointError):
    """The checkpoint is of another model, such as Gemma."""


class ConfigError(CheckpointError):
    """The config is missing, incomplete or contradicts the tensors or what was asked for."""


class TokenizerError(CheckpointError):
    """The tokenizer is missing, unreadable or of another size than the vocabulary."""


class DestinationError(CheckpointError):
    """The destination exists, or cannot be written."""


class DiskSpaceError(CheckpointError):
    """The disk has less room than what is to be written."""


class MissingExtraError(CheckpointError):
    """A format needs packages that are not installed; the message has the pip command."""

    def __init__(self, what: str, package: str, install: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed: pip install {install}")


class MissingFrameworkError(MissingExtraError, ImportError):
    """A twin was imported without its framework."""


class VerificationError(CheckpointError):
    """What was written does not read back as what was meant: nothing was kept."""


class DownloadError(CheckpointError):
    """A download failed; the message says what to do."""
