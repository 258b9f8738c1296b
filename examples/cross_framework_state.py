"""Reads a text in one framework and continues it in the other, through a state file.

python examples/cross_framework_state.py
"""

import argparse
import tempfile
from pathlib import Path

from recurrentgemma.cli.script import Script


def main(flags: argparse.Namespace) -> int:
    import jax.numpy as jnp
    import torch

    from recurrentgemma import jax as in_jax
    from recurrentgemma import torch as in_torch

    model, params = in_jax.load_checkpoint(flags.path_checkpoint, dtype=jnp.float32)
    vocab = in_jax.load_tokenizer(flags.path_checkpoint)
    jax_sampler = in_jax.Sampler(model=model, vocab=vocab, params=params)
    model = in_torch.load_checkpoint(flags.path_checkpoint, dtype=torch.float32)
    torch_sampler = in_torch.Sampler(model=model, vocab=vocab)

    prompt, steps = flags.string_to_sample, flags.total_sampling_steps
    samplers = {"JAX": jax_sampler, "PyTorch": torch_sampler}
    texts = []
    with tempfile.TemporaryDirectory() as folder:
        for reader, writer in ("JAX", "PyTorch"), ("PyTorch", "JAX"):
            file = Path(folder) / f"{reader}.safetensors"
            samplers[reader].save_state(file, samplers[reader].prefill(prompt))
            state = samplers[writer].load_state(file)
            texts += samplers[writer].generate(state, steps).text
            size = file.stat().st_size
            print(f"{reader} reads, {writer} continues ({size:,} bytes between):\n{texts[-1]}\n")
    texts += samplers["PyTorch"]([prompt], steps).text
    same = len(set(texts)) == 1
    print("The same text as without a change of framework." if same else "THE TEXTS DIFFER.")
    return 0 if same else 1


if __name__ == "__main__":
    script = Script(description="Reads a text in one framework, continues it in the other.")
    add = script.add_argument
    add("--path_checkpoint", help="folder, file or archive of any format (the bundled model)")
    add("--string_to_sample", default="My dear Fanny,", help="prompt")
    add("--total_sampling_steps", type=int, default=30, help="how many tokens (30)")
    script.run(main)
