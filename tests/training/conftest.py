import pytest
from trainers import TRAINERS, Trainer

from backends import TWINS


def _installed(twin: str) -> Trainer:
    if twin not in TRAINERS:
        pytest.skip(f"{twin} is not installed")
    return TRAINERS[twin]


@pytest.fixture(params=TWINS)
def trainer(request: pytest.FixtureRequest) -> Trainer:
    """Each twin's training in turn."""
    return _installed(request.param)


@pytest.fixture
def trainers() -> tuple[Trainer, Trainer]:
    """Both twins' training: JAX, PyTorch."""
    one, other = map(_installed, TWINS)
    return one, other
