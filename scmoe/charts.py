"""Every chart has this style: it can be read on a page of paper and on a phone.

A chart is WIDTH inches wide, and no text is smaller than SMALL points. On a phone with 390 pixels across, the smallest
letters are then 7 pixels high; on a page of 6.75 inches they have 9 points. Only `chart` imports matplotlib, because
machines without it measure too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any

WIDTH = 6.0  # inches
SMALL = 8.0  # points
FORWARD, TRAINING, PAPER = "#4e79a7", "#f28e2b", "#5f5750"  # the same colour means the same in every chart
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
}


@contextmanager
def chart(path: Path, height: float, width: float = WIDTH) -> Iterator[Any]:
    """Gives an empty figure of this size in inches, and writes it to `path` at the end; its suffix is the format."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def title(axis: Any, text: str, letters: int = 60) -> None:
    """Sets the title of an axis, in lines of at most so many letters; 60 fill most charts."""
    axis.set_title("\n".join(fill(line, letters, break_on_hyphens=False) for line in text.split("\n")))
