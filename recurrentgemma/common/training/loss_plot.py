"""Plots the loss of training runs by step."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from recurrentgemma.common.errors import MissingExtraError
from recurrentgemma.common.io.files import whole_file
from recurrentgemma.common.training.logs import read_log
from recurrentgemma.common.training.run_folder import RunFolder

_INSTALL = "'recurrentgemma[train]'"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raises `MissingExtraError` if matplotlib is not installed."""
    if not can_draw():
        raise MissingExtraError("a plot", "matplotlib", _INSTALL)


def draw(path: Path, runs: Mapping[str, RunFolder]) -> None:
    """Draws the training and validation losses of runs, in nats per token, as a PNG file.

    Args:
      path: The file; an existing one is replaced.
      runs: The runs by name; a single run can have an empty name.

    Raises:
      MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, run) in enumerate(runs.items()):
        # Two styles: a curve does not hide another below it.
        style, marker = ("-", "o") if number % 2 == 0 else ("--", "x")
        for file, kind, sign, opacity in (
            (run.train_log, "training", "", 0.5),
            (run.validation_log, "validation", marker, 1.0),
        ):
            entries = [entry for entry in read_log(file) if entry["loss"] is not None]
            if entries:
                steps, losses = zip(*((e["step"], e["loss"]) for e in entries), strict=True)
                axes.plot(
                    steps,
                    losses,
                    color=f"C{number}",
                    label=f"{name} {kind}".strip(),
                    linestyle=style,
                    alpha=opacity,
                    marker=sign,
                    markersize=6,
                    fillstyle="none",
                )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    with whole_file(path, force=True) as temporary:
        figure.savefig(temporary, format="png")
