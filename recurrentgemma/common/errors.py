"""The errors that users of the package cause: a class for each kind."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A value or a request breaks a rule; the message has the rule, what was expected, what came.

    The package raises it instead of a plain `ValueError`, so that the command line can tell a
    user's mistake from a defect by its type.
    """


class CheckpointError(UserError):
    """A checkpoint, or a request about one, that cannot be served. Nothing was written."""


class UnknownFormatError(CheckpointError):
    """The path holds no checkpoint of a known format, or more than one."""


class PathError(CheckpointError):
    """A library that the format needs cannot open a path with this name."""


class DamagedError(CheckpointError):
    """A file is cut short, or is not a valid file of its kind."""


class UnsafePickleError(CheckpointError):
    """A pickle wants to run code, or holds more than tensors."""


class MismatchError(CheckpointError):
    """Tensors are missing, unexpected or of a wrong shape or dtype; the message lists all."""

    def __init__(self, what: str, problems: Sequence[str]) -> None:
        listed = "\n  ".join(problems)
        count = "1 difference" if len(problems) == 1 else f"{len(problems)} differences"
        super().__init__(f"{what} ({count}):\n  {listed}")


class NonFiniteError(CheckpointError):
    """Tensors hold NaN or infinity; the message names all."""


class OtherModelError(CheckpointError):
    """The checkpoint holds a model of no family that is read, such as Gemma 3n."""


class ConfigError(CheckpointError):
    """The config is missing or incomplete, or contradicts the tensors or the request."""


class TokenizerError(CheckpointError):
    """The tokenizer is missing or unreadable, or its size differs from the vocabulary."""


class DestinationError(CheckpointError):
    """The destination exists, or cannot be written."""


class DiskSpaceError(CheckpointError):
    """The disk has too little room for the output."""


class MissingExtraError(CheckpointError):
    """A format needs packages that are not installed; the message has the pip command."""

    def __init__(self, what: str, package: str, install: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed: pip install {install}")


class MissingFrameworkError(MissingExtraError, ImportError):
    """A twin was imported without its framework."""


class NonFiniteLogitsError(UserError):
    """No token can be chosen: logits are NaN or infinite; the message says where that begins."""


class VerificationError(CheckpointError):
    """The output differs when read back; it was removed."""


class DownloadError(CheckpointError):
    """A download failed; the message says what to do."""
