import pytest
from samplers import SUBMODULES


@pytest.fixture(params=["jax", "torch"])
def twin(request) -> str:
    pytest.importorskip(SUBMODULES[request.param], reason=f"{request.param} is not installed")
    return request.param
