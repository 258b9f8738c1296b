"""`torch.autocast`: blocks are narrowed, logits and losses are not."""

import pytest

pytest.importorskip("torch.nn", reason="torch is not installed")
import numpy as np
import torch
from cases import CONFIGS, make_batch

from recurrentgemma.torch import Batch, Griffin, cross_entropy, loss_fn
from tolerances import assert_close

CONFIG = CONFIGS["griffin"]
LENGTH = 11


def make_model(dtype: torch.dtype = torch.float32) -> Griffin:
    model = Griffin(CONFIG, dtype=dtype)
    model.reset_parameters(seed=0)
    return model


@pytest.mark.parametrize("cap", [5.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_are_wide(dtype: torch.dtype, cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt and of a token after it; close to those without autocast, and not rounded."""
    model = make_model(dtype)
    monkeypatch.setattr(model.embedder, "soft_cap", cap)
    tokens, segment_pos = map(torch.from_numpy, make_batch(CONFIG, LENGTH))
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
            prompt, cache = model(tokens[:, :-1], segment_pos[:, :-1])
            token, _ = model(tokens[:, -1:], segment_pos[:, -1:], cache)
        assert prompt.dtype == token.dtype == dtype
        results.append(torch.cat([prompt, token], 1)[:2].numpy())
    assert_close(results[0], results[1], "logits", "bfloat16")
    rounded = torch.from_numpy(results[0]).bfloat16().to(dtype).numpy()
    assert (results[0] != rounded).mean() > 0.9


def test_the_loss_is_wide() -> None:
    model = make_model()
    tokens, segment_pos = make_batch(CONFIG, LENGTH)
    weights = (segment_pos > 0).astype(np.float32)
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = loss_fn(model, Batch(tokens, segment_pos, tokens, weights))
        assert loss.dtype == torch.float32
        loss.backward()
        grad = model.embedder.input_embedding.grad
        assert grad is not None
        assert grad.dtype == torch.float32
        results.append(loss.detach().numpy())
        model.zero_grad()
    assert_close(results[0], results[1], "output", "bfloat16")


@pytest.mark.parametrize("needed", [True, False])
def test_cross_entropy_is_the_same(needed: bool) -> None:
    """Its products too keep the dtype of their factors."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 12, generator=generator, requires_grad=needed)
    embedding = torch.randn(29, 12, generator=generator, requires_grad=needed)
    targets = torch.randint(29, (2, 7), generator=generator)
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = cross_entropy(hidden, embedding, targets, torch.ones(2, 7), 5.0, 4)
        leaves = (hidden, embedding) if needed else ()
        results.append([loss.detach(), *(torch.autograd.grad(loss, leaves) if needed else ())])
    for one, other in zip(results[0], results[1], strict=True):
        assert torch.equal(one, other)


def test_without_a_device_that_has_autocast() -> None:
    model = Griffin(CONFIG, device="meta")
    logits, _ = model(*make_batch(CONFIG, LENGTH))
    assert logits.is_meta
    assert logits.dtype == torch.float32
