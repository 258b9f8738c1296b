"""Continues a text in JAX with the bundled model, or with a checkpoint of any format.

python examples/sampling_jax.py
python examples/sampling_jax.py --path_checkpoint=2b/ --string_to_sample="The sea is"
"""

import argparse

from recurrentgemma.cli.script import Script


def main(flags: argparse.Namespace) -> None:
    from recurrentgemma import jax as recurrentgemma

    model, params = recurrentgemma.load_checkpoint(flags.path_checkpoint)
    vocab = recurrentgemma.load_tokenizer(flags.path_tokenizer or flags.path_checkpoint)
    sampler = recurrentgemma.Sampler(model=model, vocab=vocab, params=params)
    out = sampler(
        input_strings=[flags.string_to_sample],
        total_generation_steps=flags.total_sampling_steps,
        sampling=recurrentgemma.Categorical(temperature=0.7),
        rng=flags.seed,
        echo=True,
    )
    print(out.text[0])


if __name__ == "__main__":
    script = Script(description="Continues a text in JAX.")
    add = script.add_argument
    add("--path_checkpoint", help="folder, file or archive of any format (the bundled model)")
    add("--path_tokenizer", help="sentencepiece model (the one beside the weights)")
    add("--string_to_sample", default="It is a truth universally acknowledged", help="prompt")
    add("--total_sampling_steps", type=int, default=60, help="how many tokens (60)")
    add("--seed", type=int, default=1, help="same seed, same text (1)")
    script.run(main)
