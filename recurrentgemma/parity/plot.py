"""The error by depth, as a figure."""

from __future__ import annotations

import math
import os

from recurrentgemma.common.errors import DestinationError, MissingExtraError
from recurrentgemma.common.io.files import whole_file
from recurrentgemma.parity.reading import CASES
from recurrentgemma.parity.report import Report


def check_plot(file: str | os.PathLike[str]) -> None:
    """Raises if a figure cannot be written.

    Raises:
      MissingExtraError: matplotlib is not installed; the message has the pip command.
      DestinationError: matplotlib does not write files with this suffix.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("--plot", "matplotlib", "'recurrentgemma[train]'") from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if _suffix(file) not in known:
        raise DestinationError(f"the suffix of {file} must be one of {', '.join(known)}")


def _suffix(file: str | os.PathLike[str]) -> str:
    return os.path.splitext(file)[1].removeprefix(".").lower()


def plot(report: Report, title: str, file: str | os.PathLike[str]) -> None:
    """Draws each activation's error beside its budget, from the embeddings to the logits.

    Args:
      report: What to draw.
      title: The title of the figure.
      file: Where to write the figure, in the format of its suffix; an existing file is replaced.

    Raises:
      CheckpointError: See `check_plot`.
    """
    check_plot(file)
    from matplotlib.figure import Figure

    rows = {
        case: [row for row in report.rows if row.kind == "activation" and row.case == case]
        for case in CASES
    }
    names = [row.name.removeprefix("blocks.") for row in rows[CASES[0]]]
    figure = Figure(figsize=(max(6.4, 0.28 * len(names) + 1.6), 5.2), layout="constrained")
    axes = figure.add_subplot()
    for case, marker in zip(CASES, "os^", strict=True):
        (line,) = axes.plot(
            [row.error.rms or math.nan for row in rows[case]], marker, label=case, markersize=4
        )
        axes.plot([row.error.budget for row in rows[case]], color=line.get_color(), linewidth=0.8)
        if report.wide != report.dtype:
            axes.plot(
                [row.wide.rms or math.nan for row in rows[case]],
                marker,
                color=line.get_color(),
                markersize=4,
                fillstyle="none",
            )
    axes.plot([], color="grey", linewidth=0.8, label=f"budget in {report.dtype}")
    if report.wide != report.dtype:
        axes.plot([], "o", color="grey", fillstyle="none", label=f"in {report.wide}")
    axes.set_yscale("log")
    axes.set_ylabel("RMS difference / RMS of the tensor")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_xlabel("blocks, in the order of the forward pass")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with whole_file(file, force=True) as temporary:
        figure.savefig(temporary, dpi=150, format=_suffix(file))
