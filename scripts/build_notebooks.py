"""Runs the scripts notebooks/*.py, and stores them as notebooks with their outputs.

python scripts/build_notebooks.py
python scripts/build_notebooks.py inside_griffin

What a cell draws that begins with `# %% picture="NAME"` also becomes docs/images/NAME.png.
"""

import argparse
import base64
import time
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

from recurrentgemma.cli.script import Script
from recurrentgemma.common.io.files import whole_file

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
IMAGES = FOLDER.parent / "docs/images"
SECONDS = 1200  # for a cell


def read(file: Path) -> nbformat.NotebookNode:
    """The notebook in a script, without outputs."""
    notebook = jupytext.read(file)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # the same at every build
    return notebook


def client(notebook: nbformat.NotebookNode) -> NotebookClient:
    """Runs a notebook's cells in its folder."""
    return NotebookClient(
        notebook,
        timeout=SECONDS,
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--HistoryManager.enabled=False"],
    )


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Runs every cell with this interpreter, in the notebooks' folder.

    Raises:
      CellExecutionError: A cell raised an error.
    """
    client(notebook).execute()
    # Leave out the version of the interpreter.
    notebook.metadata.language_info = {"name": "python", "file_extension": ".py"}
    return notebook


def pictures(notebook: nbformat.NotebookNode) -> Iterator[tuple[Path, bytes]]:
    """The pictures for the documentation: their files, and the bytes."""
    for cell in notebook.cells:
        if "picture" in cell.metadata:
            (drawn,) = (out.data["image/png"] for out in cell.outputs if "data" in out)
            yield IMAGES / f"{cell.metadata.picture}.png", base64.b64decode(drawn)


def main(flags: argparse.Namespace) -> None:
    files = [FOLDER / f"{name}.py" for name in flags.names] or sorted(FOLDER.glob("*.py"))
    for file in files:
        start = time.perf_counter()
        notebook = execute(read(file))
        with whole_file(file.with_suffix(".ipynb"), force=True) as temporary:
            temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        for picture, content in pictures(notebook):
            with whole_file(picture, force=True) as temporary:
                temporary.write_bytes(content)
        print(file.with_suffix(".ipynb"), f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    script = Script(description="Runs the notebooks and stores them with their outputs.")
    script.add_argument("names", nargs="*", help="which (all)")
    script.run(main)
