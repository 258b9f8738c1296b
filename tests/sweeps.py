"""How much is swept: little every time, and more with HYPOTHESIS_PROFILE=long."""

import os
from typing import TypeVar

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
T = TypeVar("T")


def sweep(short: T, long: T) -> T:
    """The first every time, the second in the long profile."""
    return long if LONG else short
