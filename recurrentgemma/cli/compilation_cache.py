"""Keeps what JAX compiled from one command to the next."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

_KEEP_DAYS = 30
# JAX reads these when it is imported. It keeps by default what took a second to compile.
_SETTINGS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
_FOLDER = "JAX_COMPILATION_CACHE_DIR"


def cache_folder() -> Path:
    """The user's cache folder on this system, with a folder of ours in it."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "recurrentgemma" / "jax"


def use_compilation_cache() -> None:
    """Turns the cache on, if JAX is not imported yet and the user has not named a folder.

    A program that was not compiled for 30 days is removed. Without a folder that can be written
    nothing is kept.
    """
    if _FOLDER in os.environ or "jax" in sys.modules:
        return
    with contextlib.suppress(OSError, RuntimeError):  # no home folder, or a full disk
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        oldest = time.time() - _KEEP_DAYS * 24 * 3600
        for entry in os.scandir(folder):
            if entry.is_file() and entry.stat().st_mtime < oldest:
                os.unlink(entry.path)
        if os.access(folder, os.W_OK):
            os.environ[_FOLDER] = str(folder)
            os.environ.update({k: v for k, v in _SETTINGS.items() if k not in os.environ})
