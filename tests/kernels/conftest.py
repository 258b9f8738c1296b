"""What every kernel is watched for."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_races(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """JAX's interpreter of TPU kernels prints the races that it finds."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out
