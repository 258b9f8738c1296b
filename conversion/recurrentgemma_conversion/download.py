"""Checkpoints from Kaggle and from Hugging Face, through the sites' own libraries."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recurrentgemma.common.errors import DiskSpaceError, DownloadError, MissingExtraError
from recurrentgemma.common.io.files import NO_ROOM, destination_path, whole_folder
from recurrentgemma_conversion.formats import Format
from recurrentgemma_conversion.opening import detect

_EXTRA = "'recurrentgemma[hub]'"
# A repository may hold other files, such as the same weights in other formats.
_HUGGINGFACE_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]


def download(
    source: str, destination: str | os.PathLike[str], *, force: bool = False
) -> tuple[Format | None, Path]:
    """Downloads a checkpoint into a folder: whole, or not at all.

    Args:
      source: "kaggle:OWNER/MODEL/FRAMEWORK/VARIATION" or "hf:OWNER/MODEL".
      destination: The folder to make.
      force: Whether to replace what is at `destination`.

    Returns:
      The format (None for an archive) and the folder.

    Raises:
      MissingExtraError: The site's library is not installed.
      DownloadError: There are no credentials, the licence is not accepted, the network or the site
        fails, or something else went wrong; the message says what to do.
      DiskSpaceError: The disk became full.
      CheckpointError: The files are no checkpoint, or `destination` exists and `force` is not set.
    """
    site, _, name = source.partition(":")
    if site not in _SITES or not name:
        raise DownloadError(
            "a source must be kaggle:OWNER/MODEL/FRAMEWORK/VARIATION or hf:OWNER/MODEL, "
            f"got {source!r}"
        )
    folder = destination_path(destination)
    with whole_folder(folder, force=force) as temporary:
        with contextlib.redirect_stdout(sys.stderr):  # the libraries print messages
            _SITES[site](name, temporary)
        format_, _ = detect(temporary)
    return format_, folder


def default_folder(source: str) -> Path:
    """The folder for a download where none is given: here, and named for the model."""
    parts = source.partition(":")[2].strip("/").split("/")
    if source.startswith("kaggle:") and len(parts) >= 4:  # "recurrentgemma-flax-2b-it"
        return Path("-".join(parts[1:4]))
    return Path(parts[-1] or "checkpoint")


def _from_huggingface(name: str, folder: Path) -> None:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise MissingExtraError("downloading from hf:", "huggingface_hub", _EXTRA) from error
    page = f"https://huggingface.co/{name}"
    try:
        huggingface_hub.snapshot_download(name, local_dir=folder, allow_patterns=_HUGGINGFACE_FILES)
    except errors.GatedRepoError as error:
        raise _refused(error, page, "hf auth login", huggingface_hub.get_token()) from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"there is no model {page}, or it is private: check the name, and log in with "
            "`hf auth login` if it is yours"
        ) from error
    except errors.HFValidationError as error:
        raise DownloadError(f"hf:{name} is no name of a model: OWNER/MODEL is expected") from error
    except Exception as error:  # several libraries raise, and they change with versions
        raise _failed("huggingface.co", page, error) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _from_kaggle(name: str, folder: Path) -> None:
    try:
        import kagglehub
        import kagglehub.config
        from kagglehub import exceptions
    except ImportError as error:
        raise MissingExtraError("downloading from kaggle:", "kagglehub", _EXTRA) from error
    page = f"https://www.kaggle.com/models/{'/'.join(name.split('/')[:2])}"
    login = (
        "make a token at https://www.kaggle.com/settings, and put it in ~/.kaggle/kaggle.json "
        "or KAGGLE_USERNAME and KAGGLE_KEY"
    )
    try:
        kagglehub.model_download(name, output_dir=str(folder))
    except (exceptions.UnauthenticatedError, exceptions.CredentialError) as error:
        raise DownloadError(f"{page} needs credentials: {login}") from error
    except exceptions.DataCorruptionError as error:
        raise DownloadError(f"a file of kaggle:{name} arrived damaged: try again") from error
    except Exception as error:  # several libraries raise, and they change with versions
        if _status(error) in (401, 403):
            credentials = kagglehub.config.get_kaggle_credentials()
            raise _refused(error, page, login, credentials) from error
        if _status(error) == 404 or isinstance(error, exceptions.NotFoundError):
            raise DownloadError(f"there is no kaggle:{name}: {page} has the names") from error
        if isinstance(error, ValueError) and not isinstance(error, OSError):  # the handle
            raise DownloadError(f"kaggle:{name}: {_first_line(error)}") from error
        raise _failed("www.kaggle.com", page, error) from error
    shutil.rmtree(folder / ".complete", ignore_errors=True)  # kagglehub's marks


_SITES: dict[str, Callable[[str, Path], None]] = {"kaggle": _from_kaggle, "hf": _from_huggingface}


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _refused(error: Exception, page: str, login: str, credentials: Any) -> DownloadError:
    """The site knows the model but refuses it: the user is unknown, or has not agreed."""
    if _status(error) == 401 or not credentials:
        return DownloadError(f"{page} needs credentials: {login}")
    return DownloadError(f"its licence is not accepted yet: open {page}, accept it, and try again")


def _failed(host: str, page: str, error: Exception) -> DownloadError | DiskSpaceError:
    """The error of a download whose login and name are right."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            return DiskSpaceError("the disk became full: make room, or choose a folder elsewhere")
        status = _status(cause) or 200
        if status == 429 or status >= 500:
            return DownloadError(f"{host} cannot serve this now (HTTP {status}): try again later")
        if status >= 400:
            return DownloadError(f"{page}: {_first_line(cause)}")
    return DownloadError(
        f"cannot reach {host}, or no longer ({_first_line(error)}): check the network and try "
        "again, or download the files elsewhere and give their folder instead"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those behind it."""
    while error is not None:
        yield error
        error = error.__cause__


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
