import importlib.util

import pytest
from samplers import SUBMODULES, make_sampler


@pytest.fixture(scope="session", params=["jax", "torch"])
def sampler(request):
    """A small model with random weights, in each twin; its programs are compiled once."""
    if importlib.util.find_spec(SUBMODULES[request.param].partition(".")[0]) is None:
        pytest.skip(f"{request.param} is not installed")
    return make_sampler(request.param)
