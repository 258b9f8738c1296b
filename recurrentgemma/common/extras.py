"""Packages that only some features need: which are installed, and how to install the others."""

from __future__ import annotations

import importlib.util

from recurrentgemma.common.errors import MissingExtraError

EXTRA_OF = {
    "jax": "jax",
    "flax": "jax",
    "optax": "jax",
    "orbax": "jax",
    "torch": "torch",
    "huggingface_hub": "hub",
    "kagglehub": "hub",
    "matplotlib": "train",
    "tensorboardX": "train",
    "starlette": "serve",
    "uvicorn": "serve",
    "msgspec": "serve",
    "prometheus_client": "serve",
}


def is_installed(module: str) -> bool:
    """Whether a top-level module of that name exists; it is not imported."""
    # Without an origin it is only a folder of that name.
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def missing(package: str) -> MissingExtraError:
    """The error of a package that is not installed; the message has the pip command."""
    return MissingExtraError("this", package, f"'recurrentgemma[{EXTRA_OF[package]}]'")


def require(*packages: str) -> None:
    """Raises `MissingExtraError` for the first of the packages that is not installed."""
    for package in packages:
        if not is_installed(package):
            raise missing(package)
