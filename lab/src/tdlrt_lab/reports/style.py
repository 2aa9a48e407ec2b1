"""The style of the figures, and SVG whose colours follow the light or dark theme of a page."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from tdlrt.files import write_atomically
from tdlrt_lab.run.plots import MODE_COLOURS, save_figure

__all__ = ["DASHES", "GREY", "SERIES", "drawing", "inline_svg", "palette", "store"]

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
    with mpl.rc_context(STYLE):
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
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # keep the layout just computed
        figure.savefig(file, format="svg", metadata={"Date": None})
        save_figure(figure, path.with_suffix(".png"), dpi=160)
    text = file.getvalue()
    write_atomically(path.with_suffix(".svg"), lambda svg: svg.write(text.encode()))
    return text


def inline_svg(svg: str, name: str, label: str) -> str:
    """Convert SVG to an HTML element without background, coloured by CSS custom properties.

    Args:
        svg: The text of the SVG.
        name: Prefix for the ids in the SVG, unique on the page.
        label: Description for screen readers.
    """
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("fill: #ffffff", "fill: none")
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda match: _css_colour(match[0]), svg)
    head, rest = svg.split(">", 1)
    width = re.search(r' width="([0-9.]+)pt"', head)
    pixels = round(float(width[1]) * 4 / 3) if width else 640
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return (
        f'{head} role="img" aria-label="{escape(label)}" style="--natural: {pixels}px">{rest}'
    ).strip()


def _css_colour(colour: str) -> str:
    return f"var(--c{colour[1:]})" if colour in DARK else colour


def palette(dark: bool) -> str:
    """CSS custom properties with the colours of the figures."""
    pairs = ((colour, other if dark else colour) for colour, other in DARK.items())
    return " ".join(f"--c{colour[1:]}: {value};" for colour, value in pairs)
