"""Building blocks of the report's figures: axes, error bars, bands over epochs and legends."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tdlrt_lab.reports.escaping import shorten
from tdlrt_lab.reports.groups import Group
from tdlrt_lab.reports.style import SERIES

__all__ = [
    "chart",
    "epoch_band",
    "error_bars",
    "legend_below",
    "mean_and_deviation",
    "series_colours",
    "stacked_charts",
    "widen",
]

SIZE = (4.5, 3.5)
MAX_LABEL = 80
"""Letters of a label in a legend; a longer one would leave no room for the axes."""

TICKS = 5
"""Largest number of intervals between the ticks of an axis."""

MIN_PERCENT_RANGE = 4.0
"""Points between the ends of an axis of percentages; of equal numbers it would show hundredths."""

FACTORS = {"compression": 100}
"""Factors of the numbers that are shown in percent."""


def chart(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(TICKS))
    _style_axes(axes)
    return figure, axes


def stacked_charts(x_label: str, upper_label: str, lower_label: str) -> tuple[Figure, Axes, Axes]:
    """A figure with two pairs of axes, one above the other, that share the horizontal axis."""
    figure = Figure(figsize=(SIZE[0], 1.5 * SIZE[1]), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.set_ylabel(upper_label)
    lower.set_ylabel(lower_label)
    lower.set_xlabel(x_label)
    for axes in (upper, lower):
        _style_axes(axes)
    return figure, upper, lower


def _style_axes(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(TICKS))
    axes.grid(True)
    axes.spines[["top", "right"]].set_visible(False)


def widen(limits: tuple[float, float], most: float = math.inf) -> tuple[float, float]:
    """Ends of an axis of percentages that are far enough apart, and not beyond `most`.

    >>> widen((98.0, 98.0), most=100.0)
    (96.0, 100.0)
    >>> widen((97.9, 103.0), most=100.0)
    (96.0, 100.0)
    """
    low, high = limits
    missing = max(0.0, MIN_PERCENT_RANGE - (high - low)) / 2
    high = min(high + missing, most)
    return min(low - missing, high - MIN_PERCENT_RANGE), high


def series_colours(labels: Iterable[str]) -> dict[str, str]:
    """A colour for each label; they repeat if there are too many labels."""
    labels = list(labels)
    return dict(zip(labels, SERIES * len(labels), strict=False))


def mean_and_deviation(groups: Sequence[Group], name: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of a number in each group, in percent where it is a share."""
    factor = FACTORS.get(name, 1)
    means = [factor * group.mean(name) for group in groups]
    return means, [factor * group.deviation(name) for group in groups]


def error_bars(
    axes: Axes, groups: Sequence[Group], x: str | Sequence[float], y: str, **style: Any
) -> None:
    """Draw the means of groups as points, with standard deviations as error bars.

    Args:
        axes: Where to draw.
        groups: One point each.
        x: Name of a number in the summaries, or the horizontal position of each point.
        y: Name of a number in the summaries.
        style: Colour, label and other arguments of `Axes.errorbar`.
    """
    xs, x_errors = mean_and_deviation(groups, x) if isinstance(x, str) else (x, None)
    ys, y_errors = mean_and_deviation(groups, y)
    axes.errorbar(xs, ys, xerr=x_errors, yerr=y_errors, capsize=3, **style)


def epoch_band(axes: Axes, group: Group, name: str, colour: str, dash: Any) -> None:
    """Draw a metric over the epochs that all runs reached: its mean, and a band of one deviation.

    Epochs whose mean is not finite are gaps.
    """
    by_epoch = list(
        zip(*([getattr(epoch, name) for epoch in run.history] for run in group.runs), strict=False)
    )
    epochs = range(1, len(by_epoch) + 1)
    means = [statistics.mean(values) for values in by_epoch]
    deviations = [
        statistics.stdev(values) if len(values) > 1 and math.isfinite(mean) else 0.0
        for values, mean in zip(by_epoch, means, strict=True)
    ]
    marker = "o" if len(by_epoch) == 1 else None
    axes.plot(epochs, means, color=colour, linestyle=dash, marker=marker, label=group.label)
    if any(deviations):
        lower = [mean - one for mean, one in zip(means, deviations, strict=True)]
        upper = [mean + one for mean, one in zip(means, deviations, strict=True)]
        axes.fill_between(epochs, lower, upper, color=colour, alpha=0.15, linewidth=0)


def legend_below(figure: Figure) -> None:
    """Add a legend below the axes, with each label once, and enlarge the figure for its lines."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    columns = 2 if max(map(len, entries)) < 26 else 1
    texts = [shorten(label, MAX_LABEL) for label in entries]
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(entries) / columns))
    legend = figure.legend(
        entries.values(), texts, loc="outside lower center", ncols=columns, handlelength=2.6
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
