"""The style of the figures, and SVG whose colours follow the light or dark theme of a page."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from tdlrt.files import write_atomically
from tdlrt_lab.run.plots import MODE_COLOURS, save_figure

__all__ = ["DASHES", "GREY", "SERIES", "drawing", "inline_svg", "palette", "store"]

SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")

INK, GRID, GREY = "#1b1f24", "#d0d4d9", "#6b7280"
SERIES = (
    "#1f5fa8", "#c2410c", "#1f7a4d", "#7e3f98", "#a16207", "#0e7490", "#be185d", "#475569",
)  # fmt: skip
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))

DARK = {
    INK: "#e8eaed",
    GRID: "#3b4148",
    GREY: "#a3abb6",
    **dict(
        zip(
            SERIES,
            (
                "#7ab3f5",
                "#fb9a5b",
                "#5fd394",
                "#d39be8",
                "#facc4b",
                "#4fd3e8",
                "#f587bd",
                "#a9b7c9",
            ),
            strict=True,
        )
    ),
    **dict(zip(MODE_COLOURS, ("#7ab3f5", "#fb9a5b", "#5fd394", "#d39be8", "#b5b5b5"), strict=True)),
}
"""The colours of the figures, and their replacements on a dark page."""

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.alpha": 1.0,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
}


@contextmanager
def drawing() -> Iterator[None]:
    """Apply the style within a `with` block."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # The font has no letters of some scripts; browsers show them nevertheless.
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def store(figure: Figure, path: Path) -> str:
    """Write a figure as SVG and PNG; the same figure gives the same bytes.

    Args:
        figure: The figure.
        path: Path without the suffix.

    Returns:
        The text of the SVG.

    Raises:
        OSError: A file cannot be written.
    """
    file = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": path.name}):
        save_figure(figure, path.with_suffix(".png"), dpi=160)  # this computes the layout
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    write_atomically(path.with_suffix(".svg"), lambda svg: svg.write(text.encode()))
    return text


def inline_svg(svg: str, name: str, label: str) -> Markup:
    """Convert SVG to an HTML element without background, coloured by CSS custom properties.

    Args:
        svg: The text of the SVG.
        name: Prefix for the ids in the SVG, unique on the page.
        label: Description for screen readers.
    """
    root = ElementTree.fromstring(svg)
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for element in root.iter():
        for key, value in element.items():
            element.set(key, _on_page(key, value, name))
    pixels = round(float(root.attrib.pop("width").removesuffix("pt")) * 4 / 3)
    del root.attrib["height"]
    root.attrib |= {"role": "img", "aria-label": label, "style": f"--natural: {pixels}px"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _on_page(key: str, value: str, name: str) -> str:
    """The value of an attribute, with ids of its own and the colours of the page."""
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href"):
        return f"#{name}-{value.removeprefix('#')}"
    value = value.replace("url(#", f"url(#{name}-").replace("fill: #ffffff", "fill: none")
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: _css_colour(match[0]), value)


def _css_colour(colour: str) -> str:
    return f"var(--c{colour[1:]})" if colour in DARK else colour


def palette(dark: bool) -> str:
    """CSS custom properties with the colours of the figures."""
    pairs = ((colour, other if dark else colour) for colour, other in DARK.items())
    return " ".join(f"--c{colour[1:]}: {value};" for colour, value in pairs)
