"""Drawings of the page as inline SVG, in colours that the page's style sheet sets.

Matplotlib draws once with stand-in colours, and `finished` replaces them by CSS variables. So one
drawing serves the light and the dark page, without a script. Texts stay texts: they can be searched
and copied, and hovering over a part that has a tip shows it.

A drawing is WIDTH inches wide, which a phone of 390 pixels shows at about one point a pixel.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from itertools import count
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

WIDTH = 4.6  # inches
SMALL = 10.5  # points
NAMES = ("ink", "muted", "line", "paper", "c1", "c2", "c3", "c4", "c5", "c6", "cell")
STAND_IN = {name: f"#0101{number:02x}" for number, name in enumerate(NAMES)}
INK, MUTED, LINE, PAPER, C1, C2, C3, C4, C5, C6, _ = STAND_IN.values()
SERIES = (C1, C2, C3, C4, C5, C6)
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.labelsize": SMALL,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": SMALL,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is one
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "xtick.labelsize": SMALL,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
    "ytick.labelsize": SMALL,
}
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
FONT = re.compile(r"(font: (?:[\w.]+ )*[\d.]+px)[^;]*")
_numbers = count(1)


@dataclass
class Drawing:
    """A figure of matplotlib, and what hovering over its parts shows.

    words: what the drawing shows, for readers who cannot see it. svg: set when it is finished.
    """

    figure: Any
    words: str
    tips: dict[str, str] = field(default_factory=dict)
    svg: Markup = field(default_factory=Markup)

    def tip(self, text: str) -> str:
        """Return a `gid` for an artist of matplotlib that shows this text under the pointer."""
        gid = f"tip-{len(self.tips)}"
        self.tips[gid] = text
        return gid


@contextmanager
def drawing(words: str, height: float) -> Iterator[Drawing]:
    """Yield an empty drawing of this height in inches; at the end its `svg` is ready."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    number = next(_numbers)
    # The salt makes the ids of clip paths differ between the drawings of a page.
    with rc_context({**STYLE, "svg.hashsalt": str(number)}):
        drawn = Drawing(Figure(figsize=(WIDTH, height)), words)
        yield drawn
        text = StringIO()
        drawn.figure.savefig(text, format="svg", metadata={"Date": None})
    drawn.svg = finished(text.getvalue(), drawn.words, drawn.tips, f"d{number}-")


def finished(text: str, words: str, tips: Mapping[str, str], prefix: str) -> Markup:
    """Return an SVG of matplotlib for the page.

    Colours become variables, tips become titles, ids get a prefix where something refers to them
    and are removed elsewhere, and the size follows the page.
    """
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(text)
    for unused in root.findall(f"{{{SVG}}}metadata"):
        root.remove(unused)

    referred = {*re.findall(r"url\(#([^)]+)\)", text), *re.findall(r'href="#([^"]+)"', text)}
    for part in root.iter():
        name = part.attrib.pop("id", "")
        if name in referred:
            part.set("id", prefix + name)
        elif name in tips:
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = tips[name]
            part.insert(0, title)
        elif name.startswith("only-"):  # `only-light` or `only-dark`: a picture for one of them
            part.set("class", name)
        for key, value in part.attrib.items():
            value = value.replace("url(#", f"url(#{prefix}")
            if key == f"{{{XLINK}}}href" and value.startswith("#"):
                value = f"#{prefix}{value[1:]}"
            part.set(key, with_variables(FONT.sub(r"\1 var(--font)", value)))

    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", words)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def with_variables(value: str) -> str:
    """Replace the stand-in colours of an attribute by variables of the style sheet."""
    for name, color in STAND_IN.items():
        value = value.replace(color, f"var(--{name})")
    return value
