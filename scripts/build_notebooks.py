"""Runs the notebooks, which are the files notebooks/*.py, and stores them with their outputs.

python scripts/build_notebooks.py
python scripts/build_notebooks.py inside_griffin
"""

import argparse
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

from recurrentgemma.cli.script import Script
from recurrentgemma.common.files import whole_file

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
SECONDS = 300  # for a cell


def read(file: Path) -> nbformat.NotebookNode:
    """A notebook from its script, without outputs; cells are numbered."""
    notebook = jupytext.read(file)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Runs every cell in the folder of the notebooks, in this interpreter's environment.

    Raises:
      CellExecutionError: A cell raised an error.
    """
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
        coalesce_streams=True,
        # No history file, and outputs of a width of their own.
        extra_arguments=["--HistoryManager.enabled=False"],
    )
    client.execute(env=client_environment())
    return notebook


def main(flags: argparse.Namespace) -> None:
    files = [FOLDER / f"{name}.py" for name in flags.names] or sorted(FOLDER.glob("*.py"))
    for file in files:
        notebook = execute(read(file))
        with whole_file(file.with_suffix(".ipynb"), force=True) as temporary:
            nbformat.write(notebook, temporary)
        print(file.with_suffix(".ipynb"))


if __name__ == "__main__":
    script = Script(description="Runs the notebooks and stores them with their outputs.")
    script.add_argument("names", nargs="*", help="which (all)")
    script.run(main)
