"""Local attention allocates nothing of size T x T, forward or backward."""

import math

import numpy as np
import pytest

from recurrentgemma.common.model.griffin import GriffinConfig

LENGTH, WINDOW = 1024, 8
CONFIG = GriffinConfig(
    vocab_size=16,
    width=8,
    mlp_expanded_width=8,
    num_heads=2,
    block_types=("attention",),  # pyright: ignore[reportArgumentType]
    embeddings_scale_by_sqrt_dim=True,
    attention_window_size=WINDOW,
    logits_soft_cap=0.0,
)
TOKENS, SEGMENT_POS = np.zeros((1, LENGTH), np.int32), np.arange(LENGTH, dtype=np.int32)[None]
# Heads x T x keys of two blocks, and no more than a few times that.
LIMIT = 4 * CONFIG.num_heads * LENGTH * 2 * WINDOW
assert LIMIT < LENGTH**2 / 4


@pytest.mark.parametrize("cached", [False, True])
def test_jax(cached: bool) -> None:
    pytest.importorskip("jax.numpy", reason="jax is not installed")
    import jax

    from recurrentgemma.jax import Griffin, init_params

    model = Griffin(CONFIG, gradient_checkpointing=False)
    cache = model.init_cache(1) if cached else None

    def loss(params):
        return model.apply({"params": params}, TOKENS, SEGMENT_POS, cache)[0].sum()

    lowered = jax.jit(jax.grad(loss)).lower(init_params(CONFIG, 0))
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert 0 < memory.temp_size_in_bytes < 16 * 4 * LIMIT
    shapes = [
        [int(size) for size in part.split("x")[:-1]]
        for part in lowered.as_text().replace("<", ">").split(">")
        if part.count("x") and part.split("x")[0].isdigit()
    ]
    assert len(shapes) > 100
    assert max(math.prod(shape) for shape in shapes) <= LIMIT


@pytest.mark.parametrize("cached", [False, True])
def test_torch(cached: bool) -> None:
    pytest.importorskip("torch.nn", reason="torch is not installed")
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from recurrentgemma.torch import Griffin

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)
            )
            return out

    model = Griffin(CONFIG, gradient_checkpointing=False)
    with Watch():
        logits, _ = model(TOKENS, SEGMENT_POS, model.init_cache(1) if cached else None)
        logits.sum().backward()
    assert len(sizes) > 100
    assert max(sizes) <= LIMIT
