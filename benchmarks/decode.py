"""Decoding and reading on a CPU against the bandwidth bound and `transformers`, interleaved.

    python benchmarks/decode.py [--rounds 9] [--threads 1] [--json FILE]

The reference workload: 23M parameters (width 512, MLP 1536, R R A twice, 8 heads, 8,192 tokens,
window 256) in float32, the same weights everywhere. In each round every contender decodes a stretch
at batch 1, then reads a prompt, in turn, and in between the rate at which memory is read is
measured with a dot product over as many bytes as the weights have. What is printed are medians over
rounds of each round's own ratios, so that what slows the machine down slows all of them: the share
of the bandwidth bound (bytes of weights over that rate) that decoding reaches, and the ratio of
each contender's rates to those of `transformers`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CONFIG = {
    "vocab_size": 8192,
    "width": 512,
    "mlp_expanded_width": 1536,
    "num_heads": 8,
    "block_types": ("recurrent", "recurrent", "attention") * 2,
    "embeddings_scale_by_sqrt_dim": True,
    "attention_window_size": 256,
    "logits_soft_cap": 30.0,
}
CONTEXT, STRETCH, PROMPT = 300, 48, 8192


class Contender(NamedTuple):
    """Something that decodes.

    Attributes:
      decode: Decodes `STRETCH` tokens; seconds a token.
      prefill: Reads `PROMPT` tokens; seconds.
    """

    decode: Callable[[], float]
    prefill: Callable[[], float]


def ours(sampler: Any) -> Contender:
    """A sampler of either twin."""
    from recurrentgemma.common.generation import Generation
    from recurrentgemma.common.state import empty_state

    def steps(length: int, number: int):
        tokens = [[5 + i % 8000 for i in range(length)]]
        state = empty_state(sampler.config, 1).extended(tokens)
        request = sampler._request(number, (None, 1, 1), (False, (), ()), None, None)
        return iter(Generation(sampler, state, request))

    def decode() -> float:
        going = steps(CONTEXT, STRETCH + 1)
        next(going)
        start = time.perf_counter()
        for _ in going:
            pass
        return (time.perf_counter() - start) / STRETCH

    def prefill() -> float:
        start = time.perf_counter()
        next(steps(PROMPT, 1))
        return time.perf_counter() - start

    return Contender(decode, prefill)


def transformers(config: Any, values: Any) -> Contender:
    """The model of `transformers`, its own cache, greedy."""
    import numpy as np
    import torch
    from transformers import DynamicCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    from recurrentgemma.common.layer_spec import layer_spec

    model = RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=2 * config.mlp_expanded_width,
            num_attention_heads=config.num_heads,
            num_key_value_heads=1,
            lru_width=config.lru_width,
            attention_window_size=config.attention_window_size + 1,
            logits_soft_cap=config.logits_soft_cap,
            block_types=[block.value for block in config.block_types],
            num_hidden_layers=config.num_layers,
        )
    ).eval()
    tensors = {
        stored.name: torch.tensor(np.array(stored.encode(values[spec.path])))
        for spec in layer_spec(config)
        for stored in spec.hf
    }
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)

    def step(tokens: Any, start: int, cache: Any) -> Any:
        position_ids = torch.arange(start, start + tokens.shape[1])[None]
        kwargs = {"use_cache": True, "past_key_values": cache, "logits_to_keep": 1}
        return model(tokens, position_ids=position_ids, **kwargs).logits[:, -1:].argmax(-1)

    def read(length: int) -> tuple[Any, Any]:
        cache = DynamicCache(config=model.config)
        return step(torch.tensor([[5 + i % 8000 for i in range(length)]]), 0, cache), cache

    @torch.no_grad()
    def decode() -> float:
        token, cache = read(CONTEXT)
        start = time.perf_counter()
        for i in range(STRETCH):
            token = step(token, CONTEXT + i, cache)
        return (time.perf_counter() - start) / STRETCH

    @torch.no_grad()
    def prefill() -> float:
        start = time.perf_counter()
        read(PROMPT)
        return time.perf_counter() - start

    return Contender(decode, prefill)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="add torch.compile's decode step")
    parser.add_argument("--json", type=Path, help="write every number measured to this file")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if arguments.threads == 1:
        os.environ["XLA_FLAGS"] = (
            "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
    import numpy as np
    import torch
    from rich.console import Console
    from rich.table import Table

    import recurrentgemma.jax
    import recurrentgemma.torch
    from recurrentgemma.common.checkpoint import load_tokenizer
    from recurrentgemma.common.config import GriffinConfig
    from recurrentgemma.common.layer_spec import sample_params

    torch.set_num_threads(arguments.threads)
    config, tokenizer = GriffinConfig(**CONFIG), load_tokenizer()
    values = {spec.path: value for spec, value in sample_params(config, 0)}
    model = recurrentgemma.torch.Griffin(config)
    model.reset_parameters(0)
    contenders = {
        "jax": ours(
            recurrentgemma.jax.Sampler(
                recurrentgemma.jax.Griffin(config),
                tokenizer,
                recurrentgemma.jax.init_params(config, 0),
            )
        ),
        "torch": ours(recurrentgemma.torch.Sampler(model, tokenizer)),
        "transformers": transformers(config, values),
    }
    if arguments.compile:
        sampler = recurrentgemma.torch.Sampler(model, tokenizer, jit_compile=True)
        contenders["torch compiled"] = ours(sampler)
    weights = torch.ones(sum(value.size for value in values.values()))
    size = weights.numel() * 4

    def bandwidth() -> float:
        start = time.perf_counter()
        torch.dot(weights, weights)
        return size / (time.perf_counter() - start)

    for contender in contenders.values():
        contender.decode()
        contender.prefill()
    rounds: list[dict[str, Any]] = []
    for _ in range(arguments.rounds):
        row: dict[str, Any] = {}
        for name, contender in contenders.items():
            rate = max(bandwidth() for _ in range(5))
            row[f"{name} decode s"] = contender.decode()
            row[f"{name} bound s"] = size / max(rate, *(bandwidth() for _ in range(5)))
        for name, contender in contenders.items():
            row[f"{name} prefill s"] = contender.prefill()
        rounds.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps({"bytes": size, "rounds": rounds}, indent=1) + "\n")

    def median(numerator: str, denominator: str) -> float:
        return float(np.median([row[numerator] / row[denominator] for row in rounds]))

    table = Table("", "ms a token", "of the bound", "x decode", "prefill tokens/s", "x prefill")
    for name in contenders:
        table.add_row(
            name,
            f"{np.median([row[f'{name} decode s'] for row in rounds]) * 1e3:.2f}",
            f"{median(f'{name} bound s', f'{name} decode s'):.0%}",
            f"{median('transformers decode s', f'{name} decode s'):.2f}",
            f"{PROMPT / np.median([row[f'{name} prefill s'] for row in rounds]):,.0f}",
            f"{median('transformers prefill s', f'{name} prefill s'):.2f}",
        )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
