"""The flags that careful people set: everything runs under each, with the same results."""

import contextlib
import functools
from typing import Any

import numpy as np
import pytest
from samplers import make_sampler
from sweeps import sweep
from trainers import make_batch

from recurrentgemma.common.generation.strategies import Categorical, Greedy
from recurrentgemma.common.training.lora import LoraOptions
from recurrentgemma.common.training.optimization import OptimizerOptions

TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)
PLACES = np.array([[-1, -1, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5]], np.int32)
STRATEGIES = [Greedy(1.3), Categorical(0.7, top_k=5, top_p=0.9, min_p=0.1), Categorical()]
TRAININGS: list[dict[str, Any]] = [
    {"optimizer": OptimizerOptions(weight_decay=0.1)},
    {"lora": LoraOptions(rank=2, quantize=True)},
]


def everything(twin: str, dtype: str, under, trainings=TRAININGS) -> dict[str, Any]:
    """Forward and backward, sampling, scoring, training and adapters, all under a flag."""
    import importlib

    module = importlib.import_module(f"recurrentgemma.{twin}")
    sampler = make_sampler(twin, dtype=dtype)
    batch = make_batch(sampler.config, 0, rows=2, length=6)
    model = (sampler.model,) if twin == "torch" else (sampler.model, sampler.params)
    results: dict[str, Any] = {}
    with under():
        logits, cache = forward(sampler, twin, TOKENS, PLACES)
        logits_after, _ = forward(sampler, twin, TOKENS[:, :1], PLACES[:, -1:] + 1, cache)
        results["logits"] = [np.asarray(z, np.float32).tolist() for z in (logits, logits_after)]
        out = sampler(["In", "x", "It was"], 3, sampling=STRATEGIES, num_logprobs=2, rng=1)
        results["text"] = out.text
        sampler.engine.burst = 2
        results["bursts"] = sampler(["In"], 4, num_samples=2, rng=1, sampling=STRATEGIES[1]).text
        results["score"] = sampler.score(["In the beginning"])[0].logprobs.tolist()
        for options in trainings:
            state = module.create_train_state(*model, **options)
            state, metrics = module.train_step(state, [batch, batch])
            results |= {f"{name} of {[*options]}": float(metrics[name]) for name in metrics}
            results |= module.evaluate(state, [batch])
            module.parameters(state)
    return results


@functools.cache
def without_flags(twin: str, dtype: str) -> dict[str, Any]:
    return everything(twin, dtype, contextlib.nullcontext)


def forward(sampler, twin: str, tokens, places, cache=None):
    if twin == "jax":
        import jax

        apply = jax.jit(sampler.model.apply)
        return apply({"params": sampler.params}, tokens, places, cache)
    logits, cache = sampler.model(tokens, places, cache)
    return logits.detach().cpu().float(), cache


@pytest.mark.parametrize("flag", ["strict ranks and dtypes", "debug_nans", "check_tracer_leaks"])
def test_jax(flag: str) -> None:
    jax = pytest.importorskip("jax")

    @contextlib.contextmanager
    def under():
        match flag:
            case "debug_nans":
                with jax.debug_nans(True):
                    yield
            case "check_tracer_leaks":
                with jax.checking_leaks():
                    yield
            case _:
                with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
                    yield

    expected = without_flags("jax", "bfloat16")
    # Under this flag JAX traces again at every call: adapters are trained by the same step.
    fewer = flag == "check_tracer_leaks" and sweep(True, False)
    found = everything("jax", "bfloat16", under, TRAININGS[1:] if fewer else TRAININGS)
    assert found == {name: expected[name] for name in (found if fewer else expected)}


@pytest.mark.parametrize("flag", ["default dtype", "default device", "deterministic"])
def test_torch(flag: str) -> None:
    torch = pytest.importorskip("torch")

    @contextlib.contextmanager
    def under():
        dtype = torch.get_default_dtype()
        try:
            match flag:
                case "default dtype":
                    torch.set_default_dtype(torch.float64)
                case "default device":
                    torch.set_default_device("meta")
                case _:
                    torch.use_deterministic_algorithms(True)
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_default_device(None)
            torch.use_deterministic_algorithms(False)

    expected = without_flags("torch", "float32")
    assert everything("torch", "float32", under) == expected


@pytest.mark.parametrize("scheme", [None, "q8"])
def test_torch_inference_mode(scheme: str | None) -> None:
    torch = pytest.importorskip("torch")
    from recurrentgemma.torch.quantization import quantize_matrices

    sampler = make_sampler("torch")
    quantize_matrices(sampler.model, scheme)
    expected = sampler(["In the"], 4).text
    with torch.inference_mode():
        assert sampler(["In the"], 4).text == expected
        state = sampler.prefill("In the")
        logits, cache = sampler.model(TOKENS, PLACES)
        sampler.score(["In"])
    # What was made there goes on outside.
    assert sampler.generate(state, 4).text == expected
    with torch.no_grad():
        sampler.model(TOKENS[:, :1], PLACES[:, -1:] + 1, cache)
    assert torch.isfinite(logits[1]).all()
