"""The platform for which code is traced."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

TRITON = "jax.experimental.pallas.triton"


class Target(NamedTuple):
    """A platform, "cpu", "gpu" or "tpu", and how `pallas_call` interprets kernels for it."""

    platform: str
    interpret: Any = False


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def pallas_target(platform: str, interpret: Any = False) -> Iterator[None]:
    """Makes code traced inside run on this platform, whatever devices there are.

    Use it to compile ahead of time or, with `interpret`, to run a Pallas kernel on the CPU.

    Args:
      platform: "tpu" or "gpu".
      interpret: See `pallas_call`.
    """
    token = _target.set(Target(platform, interpret))
    try:
        yield
    finally:
        _target.reset(token)


def given_target() -> Target | None:
    """The target of `pallas_target`, if code is traced inside one."""
    return _target.get()


def default_platform() -> str:
    """The platform of arrays that nobody has placed."""
    device = jax.config.values["jax_default_device"] or jax.default_backend()
    return getattr(device, "platform", device)


def pallas_lowers(platform: str) -> bool:
    """Whether this JAX lowers kernels for a platform: later versions drop Triton."""
    if platform == "gpu":
        try:
            importlib.import_module(TRITON)
        except ImportError:
            return False
    return True
