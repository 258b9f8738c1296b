"""Converts a checkpoint to another format, bit for bit, and lists the names in both.

python examples/convert_checkpoint.py --path_destination=tiny-hf/
python examples/convert_checkpoint.py --path_checkpoint=2b-it/ --path_destination=2b-it-hf/
"""

import argparse

from recurrentgemma.cli.script import Script
from recurrentgemma.common.io.checkpoint import BUNDLED
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma_conversion import Format, convert, open_checkpoint
from recurrentgemma_conversion.convert import WRITERS


def main(flags: argparse.Namespace) -> None:
    source = flags.path_checkpoint or BUNDLED
    summary = convert(source, flags.path_destination, flags.to)

    # Opening a checkpoint reads its headers; `read(spec)` reads one parameter.
    with open_checkpoint(flags.path_destination) as checkpoint:
        for spec in layer_spec(checkpoint.config):
            print(spec.path, spec.shape)
            for stored in checkpoint.layout.pieces[spec.path]:
                print(f"    {stored.name} {stored.shape} {checkpoint.dtypes[spec.path]}")
    print(
        f"{summary.source_format} to {summary.format} in {flags.path_destination}: "
        f"{summary.values:,} values in {summary.tensors} parameters, read again and compared."
    )


if __name__ == "__main__":
    script = Script(description="Converts a checkpoint to another format.")
    add = script.add_argument
    add("--path_checkpoint", help="folder, file or archive of any format (the bundled model)")
    add("--path_destination", required=True, help="the folder to make")
    add("--to", choices=list(WRITERS), default=Format.HUGGINGFACE, help="format (huggingface)")
    script.run(main)
