"""The style of every chart: it can be read on paper, on a phone, and by colour-blind readers.

A chart is CHART_WIDTH inches wide, and no text is smaller than SMALL points. On a phone of 390
pixels, a point is then a pixel; on a page whose text is 6.5 inches wide, the smallest letters have
10.8 points. Only functions import matplotlib, because machines without it measure too.

A PNG carries a digest of what it shows, so that a test can tell whether drawing it again would show
something else.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any

CHART_WIDTH = 5.4  # inches
SMALL = 9.0  # points
# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE = "#0072b2"
SKY = "#56b4e9"
GREEN = "#009e73"
ORANGE = "#e69f00"
RED = "#d55e00"
PURPLE = "#cc79a7"
PAPER = "#5f5750"  # values that the paper prints
LINES = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, PAPER)  # of lines that are compared, in order
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.labelsize": SMALL,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
}


@contextmanager
def chart(path: Path, height: float, width: float = CHART_WIDTH) -> Iterator[Any]:
    """Yield an empty figure of this size in inches, and write it to `path` at the end.

    The suffix of `path` is the format.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Description": content(figure)} if path.suffix == ".png" else None
        figure.savefig(path, metadata=metadata)


def heading(figure: Any, text: str) -> None:
    """Set the title of a figure, at its left edge, in lines of at most 62 letters."""
    figure.suptitle(_in_lines(text, 62), x=0.01, ha="left", fontsize=10.5)


def title(axis: Any, text: str, letters: int = 52) -> None:
    """Set the title of an axis, in lines of at most so many letters.

    52 letters fill most charts beside the names of rows.
    """
    axis.set_title(_in_lines(text, letters))


def _in_lines(text: str, letters: int) -> str:
    return "\n".join(fill(line, letters, break_on_hyphens=False) for line in text.split("\n"))


def content(figure: Any) -> str:
    """Return a digest of what a figure shows: texts, shapes, colours, sizes, and names of ticks.

    Positions of ticks and of the layout are left out: versions of matplotlib differ in them.
    """
    import numpy as np
    from matplotlib.collections import Collection
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.spines import Spine
    from matplotlib.text import Text
    from matplotlib.ticker import FixedLocator, FuncFormatter

    def numbers(array: Any) -> list[str]:
        return [f"{x:.5g}" for x in np.ravel(np.ma.filled(array, np.nan))]

    def shown(part: Any) -> Any:
        match part:
            case Spine():
                return None
            case Text():
                return (
                    part.get_text(),
                    numbers(part.get_position()),
                    part.get_color(),
                    part.get_fontsize(),
                )
            case Line2D():
                return numbers(part.get_xydata()), part.get_color(), str(part.get_linestyle())
            case Patch():
                vertices = part.get_patch_transform().transform(part.get_path().vertices)
                return numbers(vertices), numbers(part.get_facecolor())
            case Collection():
                paths = [numbers(path.vertices) for path in part.get_paths()]
                return paths, numbers(part.get_offsets()), numbers(part.get_edgecolor())
            case AxesImage():
                return numbers(part.get_array()), part.get_cmap().name
        return None

    legend_texts = [text for legend in figure.legends for text in legend.get_texts()]
    words = [text.get_text() for text in [*figure.texts, *legend_texts]]
    seen: list[Any] = [{**STYLE, "savefig.dpi": None}, numbers(figure.get_size_inches()), words]
    for axes in figure.axes:
        if axes.get_label() != "<colorbar>":
            seen += [shown(part) for part in axes.get_children()]
            for axis in (axes.xaxis, axes.yaxis):
                locator, formatter = axis.get_major_locator(), axis.get_major_formatter()
                named = isinstance(locator, FixedLocator) and isinstance(formatter, FuncFormatter)
                names = [formatter(tick) for tick in locator.locs] if named else []
                seen.append([axis.get_label_text(), axis.get_scale(), names])
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()
