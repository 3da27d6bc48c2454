"""What every picture must be: readable on a phone and in print, with words that cover nothing."""

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from scmoe.charts import CHART_WIDTH, SMALL


def assert_readable(figure: Figure) -> None:
    """Assert that no text is smaller than a phone shows, cut off, or on another one."""
    assert figure.get_figwidth() <= CHART_WIDTH
    FigureCanvasAgg(
        figure
    ).draw()  # places are those of the last drawing, which had the file's resolution
    boxes = shown_texts(figure)
    width, height = figure.bbox.size
    for words, size, box in boxes:
        assert size >= SMALL, words
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, words
    corners = np.array([box.extents for _, _, box in boxes])  # left, bottom, right, top
    both = np.minimum(corners[:, None, 2:], corners[:, 2:]) - np.maximum(
        corners[:, None, :2], corners[:, :2]
    )
    for i, j in np.argwhere((both > 1).all(-1)):
        assert i == j, (boxes[i][0], boxes[j][0])


def assert_values_off_the_bars(figure: Figure) -> None:
    """Call it after assert_readable, which lays the figure out."""
    for axes in figure.axes:
        bars = [patch.get_window_extent() for patch in axes.patches if isinstance(patch, Rectangle)]
        for text in axes.texts:
            assert not any(overlap(text.get_window_extent(), bar) for bar in bars), text.get_text()


def shown_texts(figure: Figure) -> list[tuple[str, float, Any]]:
    """Return the words, the size in points and the place of every text; of ticks those that are
    inside the axis."""
    ticks = {}
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                inside = low - 1e-9 <= tick.get_loc() <= high + 1e-9
                ticks.update({id(label): inside for label in (tick.label1, tick.label2)})
    texts = [
        t
        for t in figure.findobj(Text)
        if t.get_text().strip() and t.get_visible() and ticks.get(id(t), True)
    ]
    return [(t.get_text(), t.get_fontsize(), t.get_window_extent()) for t in texts]


def overlap(a: Any, b: Any) -> bool:
    """Return whether two boxes share more than a pixel in both directions."""
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
