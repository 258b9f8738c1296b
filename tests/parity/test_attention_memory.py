"""Attention allocates nothing of size T x T, forward or backward, and keeps nothing of it."""

import math
from typing import NamedTuple

import numpy as np
import pytest
from sweeps import sweep

from recurrentgemma.common.model.config import Layer, ModelConfig
from recurrentgemma.common.model.mixers import Attention, Rope

HEADS = 2


class Case(NamedTuple):
    """An attention, a length of text, and how many keys a query has scores of at once."""

    mixer: Attention
    length: int
    keys: int

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(vocab_size=16, width=8, layers=(Layer(self.mixer, 8, mlp_bias=False),))

    @property
    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        place = np.arange(self.length, dtype=np.int32)[None]
        return np.zeros_like(place), place

    @property
    def limit(self) -> int:
        """Elements of an array: no more than a few times heads x T x keys."""
        limit = 4 * HEADS * self.length * self.keys
        assert limit < self.length**2 / 4
        return limit


def attention(reach: int | None, soft_cap: float = 0.0) -> Attention:
    return Attention(HEADS, 1, 4, reach, Rope(), scale=0.5, soft_cap=soft_cap)


# Keys of two windows; as many scores as a block of 256 queries has, for all keys.
CASES = {
    "window": Case(attention(8), 1024, 2 * 8),
    "capped window": Case(attention(8, 2.0), 1024, 2 * 8),
    "all": Case(attention(None), 10_240, 256),
    "all, capped": Case(attention(None, 2.0), 10_240, 256),
}


# In the short profile each case has a cache or none.
CACHED = {"window": True, "capped window": False, "all": False, "all, capped": True}
PAIRS = sweep([*CACHED.items()], [(name, cached) for name in CASES for cached in (False, True)])


@pytest.mark.parametrize(("name", "cached"), PAIRS)
def test_jax(name: str, cached: bool) -> None:
    case = CASES[name]
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    import jax

    from recurrentgemma.jax import Griffin, init_params

    model = Griffin(case.config, gradient_checkpointing=False)
    cache = model.init_cache(1, capacity=case.length) if cached else None

    def loss(params):
        return model.apply({"params": params}, *case.batch, cache)[0].sum()

    lowered = jax.jit(jax.grad(loss)).lower(init_params(case.config, 0))
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert 0 < memory.temp_size_in_bytes < 16 * 4 * case.limit
    shapes = [
        [int(size) for size in part.split("x")[:-1]]
        for part in lowered.as_text().replace("<", ">").split(">")
        if part.count("x") and part.split("x")[0].isdigit()
    ]
    assert len(shapes) > 100
    assert max(math.prod(shape) for shape in shapes) <= case.limit


@pytest.mark.parametrize(("name", "cached"), PAIRS)
def test_torch(name: str, cached: bool) -> None:
    case = CASES[name]
    pytest.importorskip("torch.nn", reason="torch is not installed")
    import torch
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from recurrentgemma.torch import Griffin

    sizes, kept = [], {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)
            )
            return out

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    model = Griffin(case.config, gradient_checkpointing=False)
    cache = model.init_cache(1, capacity=case.length) if cached else None
    with Watch():
        with saved_tensors_hooks(keep, lambda value: value):
            logits, _ = model(*case.batch, cache)
        logits.sum().backward()
    assert len(sizes) > 100
    assert max(sizes) <= case.limit
    assert 0 < sum(kept.values()) < 2048 * case.length  # bytes
