"""A RecurrentGemma with random weights on disk, with the tokenizer of the bundled chat model.

    python benchmarks/random_checkpoint.py FOLDER

By default it has 152 million parameters, 0.61 GB in float32. A step reads them all from memory, as
in a model of a real size; the bundled models fit into a CPU's cache.
"""

from __future__ import annotations

import argparse

from recurrentgemma.common.io.checkpoint import BUNDLED_CHAT, load_tokenizer
from recurrentgemma.common.model.griffin import GriffinConfig, TemporalBlockType
from recurrentgemma.common.model.layer_spec import num_parameters, sample_params
from recurrentgemma.common.twin import find_twin
from recurrentgemma.torch.checkpoint import save_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    pattern = [TemporalBlockType.RECURRENT] * 2 + [TemporalBlockType.ATTENTION]
    tokenizer = load_tokenizer(BUNDLED_CHAT)
    config = GriffinConfig(
        vocab_size=tokenizer.size,
        width=args.width,
        mlp_expanded_width=3 * args.width,
        num_heads=args.width // 128,
        block_types=tuple(pattern[n % 3] for n in range(args.layers)),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=512,
        logits_soft_cap=30.0,
    )
    twin = find_twin("torch")
    values = ((spec.path, value) for spec, value in sample_params(config, 0))
    save_checkpoint(args.folder, twin.make(config, values, "float32", "cpu"), tokenizer)
    print(f"{args.folder}: {num_parameters(config) / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
