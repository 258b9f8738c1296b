"""Runs the model by hand in JAX: reads two prompts at once, then decodes token by token.

python examples/simple_run_jax.py
python examples/simple_run_jax.py --debug    # a tiny random model; NaN is an error
"""

import argparse

from recurrentgemma.cli.script import Script
from recurrentgemma.common.padding import pad_left

PROMPTS = ["In the beginning", "It is a truth universally acknowledged, that"]


def main(flags: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp

    from recurrentgemma import jax as recurrentgemma

    if flags.debug:
        jax.config.update("jax_debug_nans", True)
        config = recurrentgemma.GriffinConfig(
            vocab_size=2048,
            width=32,
            mlp_expanded_width=96,
            num_heads=2,
            block_types=(
                recurrentgemma.TemporalBlockType.RECURRENT,
                recurrentgemma.TemporalBlockType.ATTENTION,
            ),
            embeddings_scale_by_sqrt_dim=True,
            attention_window_size=16,
            logits_soft_cap=30.0,
        )
        model, params = recurrentgemma.Griffin(config), recurrentgemma.init_params(config, seed=0)
    else:
        model, params = recurrentgemma.load_checkpoint(dtype=jnp.float32)
    vocab = recurrentgemma.load_tokenizer()
    apply = jax.jit(model.apply, static_argnames=["last_logits_only"])

    # Prefill: padding goes before a prompt, at position -1.
    prompts = [vocab.encode(prompt) for prompt in PROMPTS]
    tokens, segment_pos = pad_left(prompts, vocab.pad_id)
    logits, cache = apply({"params": params}, tokens, segment_pos, last_logits_only=True)

    # Decode: choose each token from the last logits, and pass the state on.
    decoded = []
    for step in range(flags.total_sampling_steps):
        token = logits[:, -1].argmax(-1)
        decoded.append(token)
        segment_pos = segment_pos[:, -1:] + 1
        logits, cache = apply({"params": params}, token[:, None], segment_pos, cache)
        if flags.debug:
            print(f"step {step}: tokens {token}, logits {logits.shape} up to {logits.max():.3f}")

    for prompt, row in zip(prompts, jnp.stack(decoded, 1).tolist(), strict=True):
        print(vocab.decode(prompt + row))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) / len(PROMPTS)
    print(f"The state of each row has {size:,.0f} bytes, however long its text.")


if __name__ == "__main__":
    script = Script(description="Runs the model by hand in JAX.")
    script.add_argument("--debug", action="store_true", help="a tiny random model, step by step")
    script.add_argument("--total_sampling_steps", type=int, default=20, help="how many tokens (20)")
    script.run(main)
