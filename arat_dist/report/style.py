"""How the plots look: colours that colour-blind eyes tell apart, and vector graphics that follow the page's theme.

matplotlib draws in the light theme's colours. In the page each of them becomes a CSS variable of the same name, so that
one graphic serves the light theme and the dark one.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib as mpl
from matplotlib.figure import Figure

LIGHT = {
    "--ink": "#1b2026",
    "--muted": "#5b6672",
    "--grid": "#e1e5ea",
    "--surface": "#ffffff",
    "--c0": "#0072b2",
    "--c1": "#d55e00",
    "--c2": "#008f68",
    "--c3": "#b0508a",
    "--c4": "#3593cc",
    "--c5": "#8a6d00",
}
"""After Okabe & Ito's palette for all kinds of colour vision, a little darker where white is behind it."""

DARK = {
    "--ink": "#e7eaee",
    "--muted": "#a0abb7",
    "--grid": "#333b45",
    "--surface": "#181c21",
    "--c0": "#5db4f0",
    "--c1": "#ff9350",
    "--c2": "#3ecfa3",
    "--c3": "#ea9cc8",
    "--c4": "#a9dcff",
    "--c5": "#e5c24d",
}

_VARIABLES = {value: f"var({name})" for name, value in LIGHT.items()}
_SVG = "http://www.w3.org/2000/svg"
# The style sheet would hold for the whole page.
_LEFT_OUT = (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style")
ET.register_namespace("", _SVG)
ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")

INK, MUTED, GRID, SURFACE = (LIGHT[name] for name in ("--ink", "--muted", "--grid", "--surface"))
COLOURS = tuple(value for name, value in LIGHT.items() if name.startswith("--c"))
DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

_RC: dict[Any, Any] = {
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 10.5,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.4,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "arat",
    "text.color": INK,
    # Names of runs and classes are text, whatever signs are in them.
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def colour(index: int) -> str:
    """Of the index-th run or line; after the last one they begin again, with other dashes."""
    return COLOURS[index % len(COLOURS)]


def dash(index: int) -> str | tuple[int, tuple[float, ...]]:
    """Matplotlib's line style of the index-th run or line."""
    return DASHES[index % len(DASHES)]


@contextmanager
def styled() -> Iterator[None]:
    """Figures are made and saved inside; what else draws in this process keeps its own settings."""
    with mpl.rc_context(_RC), warnings.catch_warnings():
        # A sign that the font lacks is drawn as a box in the PNG; the page has the reader's own fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def to_svg(figure: Figure, prefix: str) -> str:
    """A figure as an SVG element for a page: scalable, in the page's font and colours.

    Args:
        figure: drawn inside `styled`.
        prefix: makes the ids unique within the page.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ET.fromstring(buffer.getvalue())  # noqa: S314  matplotlib wrote it
    for parent in list(root.iter()):
        for child in [each for each in parent if each.tag in _LEFT_OUT]:
            parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, _for_page(key.rpartition("}")[2], value, prefix))
    for size in ("width", "height"):
        root.attrib.pop(size)
    root.set("aria-hidden", "true")  # the text beside it says what it shows
    return ET.tostring(root, encoding="unicode")


def _for_page(key: str, value: str, prefix: str) -> str:
    """An attribute with ids of the page and, in a style, variables for colours."""
    if key == "id":
        return f"{prefix}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    value = value.replace("url(#", f"url(#{prefix}-")
    return (
        re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found[0], found[0]), value) if key == "style" else value
    )


def to_png(figure: Figure, title: str) -> bytes:
    """A figure as a PNG of its own: on white, with its title."""
    figure.suptitle(title, fontsize=10.5, fontweight="bold", x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor=SURFACE, metadata={"Software": None})
    return buffer.getvalue()
