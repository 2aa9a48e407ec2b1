"""The figures of a section, with their captions."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tdlrt_lab.reports.charts import (
    TICKS,
    chart,
    epoch_band,
    error_bars,
    legend_below,
    mean_and_deviation,
    series_colours,
    stacked_charts,
    widen,
)
from tdlrt_lab.reports.collect import Run
from tdlrt_lab.reports.groups import Group, Section
from tdlrt_lab.reports.style import DASHES, GREY
from tdlrt_lab.run.metrics import is_finite_number
from tdlrt_lab.run.plots import layer_figure, rank_figure

__all__ = ["Picture", "comparison_figures", "layer_figures"]

MAX_CURVES = 10
SENSITIVITY = {"rank": "initial rank", "lr": "learning rate", "tau": "tolerance tau"}
REFERENCE_MARKERS = "sD^vPX"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure.

    Attributes:
        name: Name of the figure in file names.
        figure: The drawing.
        caption: Description of what the figure shows.
    """

    name: str
    figure: Figure
    caption: str


def comparison_figures(section: Section) -> list[Picture]:
    """The figures that compare groups, without those for which there are no numbers."""
    figures = [_compression(section), _time(section), _latency(section), _convergence(section)]
    figures += [_sensitivity(section, option) for option in SENSITIVITY]
    return [figure for figure in figures if figure is not None]


def _compression(section: Section) -> Picture | None:
    if not section.series:
        return None
    figure, axes = chart("compression of the factorised layers (%)", section.measure.title)
    means, deviations = mean_and_deviation(section.references, section.measure.name)
    for group, mean, deviation in zip(section.references, means, deviations, strict=True):
        axes.axhline(mean, color=GREY, linestyle="--", linewidth=1.2, label=group.label)
        axes.axhspan(mean - deviation, mean + deviation, color=GREY, alpha=0.15, linewidth=0)
    _draw_series(axes, section, "compression", section.groups)
    axes.set_xlim(widen(axes.get_xlim()))
    _show_percentages(axes, section)
    legend_below(figure)
    quality = section.measure.words.capitalize()
    caption = f"{quality} against compression, mean and standard deviation over the seeds"
    return Picture(name=_against(section, "compression"), figure=figure, caption=caption)


def _time(section: Section) -> Picture:
    figure, axes = chart("training time (s)", section.measure.title)
    _draw_references(axes, section, "seconds", section.groups)
    _draw_series(axes, section, "seconds", section.groups)
    axes.set_xlim(left=0)
    _show_percentages(axes, section)
    legend_below(figure)
    caption = f"{section.measure.words.capitalize()} against training time"
    return Picture(name=_against(section, "time"), figure=figure, caption=caption)


def _latency(section: Section) -> Picture | None:
    measured = [group for group in section.groups if group.values("latency_ms")]
    if not measured:
        return None
    figure, axes = chart("time of a forward pass (ms)", section.measure.title)
    _draw_references(axes, section, "latency_ms", measured)
    _draw_series(axes, section, "latency_ms", measured)
    dense = statistics.mean(ms for group in measured for ms in group.values("dense_latency_ms"))
    axes.axvline(dense, color=GREY, linestyle=":", linewidth=1.2, label="dense network")
    axes.set_xlim(left=0)
    _show_percentages(axes, section)
    legend_below(figure)
    quality = section.measure.words.capitalize()
    caption = f"{quality} against the time of a forward pass of the plain network"
    return Picture(name=_against(section, "latency"), figure=figure, caption=caption)


def _against(section: Section, other: str) -> str:
    return f"{section.measure.words.replace(' ', '-')}-{other}"


def _show_percentages(axes: Axes, section: Section) -> None:
    """Let an axis of accuracies end a little above 100 %, so that a point there is whole."""
    if section.measure.name == "accuracy":
        axes.set_ylim(widen(axes.get_ylim(), most=100.2))


def _draw_references(axes: Axes, section: Section, x: str, among: Sequence[Group]) -> None:
    """Draw the dense groups as points, each with a marker of its own."""
    groups = [group for group in section.references if group in among]
    for number, group in enumerate(groups):
        marker = REFERENCE_MARKERS[number % len(REFERENCE_MARKERS)]
        style: dict[str, Any] = {
            "color": GREY,
            "label": group.label,
            "marker": marker,
            "linestyle": "none",
        }
        error_bars(axes, [group], x, section.measure.name, **style)


def _draw_series(axes: Axes, section: Section, x: str, among: Sequence[Group]) -> None:
    """Draw one line per series of compressed groups."""
    colours = series_colours(section.series)
    for label, groups in section.series.items():
        shown = [group for group in groups if group in among]
        if shown:
            style: dict[str, Any] = {"color": colours[label], "label": label, "marker": "o"}
            error_bars(axes, shown, x, section.measure.name, markersize=4.5, **style)


def _convergence(section: Section) -> Picture | None:
    """The measure and the training loss over the epochs."""
    groups = _choose_curves([g for g in section.groups if all(run.history for run in g.runs)])
    if not groups:
        return None
    figure, upper, lower = stacked_charts("epoch", section.measure.title, "training loss")
    for group, colour, dash in _curve_styles(section, groups):
        epoch_band(upper, group, section.measure.name, colour, dash)
        epoch_band(lower, group, "loss", colour, dash)
    lower.set_yscale("log")
    lower.xaxis.set_major_locator(MaxNLocator(TICKS, integer=True))
    legend_below(figure)
    caption = "Convergence: mean over the seeds, and one standard deviation around it"
    return Picture(name="convergence", figure=figure, caption=caption)


def _choose_curves(groups: Sequence[Group]) -> list[Group]:
    """All groups if there are few, else the least and the most compressed of each series."""
    if len(groups) <= MAX_CURVES:
        return list(groups)
    ends: dict[str, list[Group]] = {}
    for group in groups:
        ends[group.series] = [*ends.get(group.series, [])[:1], group]
    return [group for pair in ends.values() for group in pair]


def _curve_styles(section: Section, groups: Sequence[Group]) -> Iterator[tuple[Group, str, Any]]:
    """Each group with the colour of its series, and dashes that differ within the series."""
    colours = series_colours(section.series)
    counts: dict[str, int] = {}
    for group in groups:
        colour = GREY if group.dense else colours[group.series]
        number = counts.get(colour, 0)
        counts[colour] = number + 1
        yield group, colour, DASHES[number % len(DASHES)]


def _sensitivity(section: Section, option: str) -> Picture | None:
    """The measure and compression against an option, for groups that differ in nothing else."""
    lines: dict[str, dict[float, Group]] = {}
    for group in section.groups:
        value = _number(group.first, option)
        if value is not None and not group.dense:
            lines.setdefault(group.label_without(option), {})[value] = group
    lines = {label: points for label, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    measure = section.measure
    figure, upper, lower = stacked_charts(SENSITIVITY[option], measure.title, "compression (%)")
    colours = series_colours(section.series)
    if not lines.keys() <= colours.keys():  # these lines are not those of the other figures
        colours = series_colours(lines)
    for label, points in lines.items():
        values = sorted(points)
        groups = [points[value] for value in values]
        for axes, number in ((upper, measure.name), (lower, "compression")):
            style: dict[str, Any] = {"color": colours[label], "label": label, "marker": "o"}
            error_bars(axes, groups, values, number, **style)
    every = [value for points in lines.values() for value in points]
    if min(every) > 0 and max(every) / min(every) > 5:
        lower.set_xscale("log")
    else:
        lower.xaxis.set_major_locator(MaxNLocator(TICKS))
    legend_below(figure)
    caption = f"Sensitivity to the {SENSITIVITY[option]}, all other options equal"
    return Picture(name=f"sensitivity-{option}", figure=figure, caption=caption)


def _number(run: Run, option: str) -> float | None:
    """The value of an option, if it is a finite number and the run's method uses it."""
    value = run.summary.get("tau") if option == "tau" else run.config.get(option)
    if option == "rank" and value == "full":
        return 1.0
    if not isinstance(value, int | float) or not is_finite_number(value):
        return None
    return float(value)


def layer_figures(
    number: int, group: Group, spectra: Mapping[str, Sequence[Sequence[float]]]
) -> Iterator[Picture]:
    """Ranks over training and singular values of the cores, for the first seed of a group.

    Args:
        number: The number of the group in its section, for the names of the pictures.
        group: The group.
        spectra: Singular values of its first run, by layer and mode.
    """
    subject = f"{group.label}, seed {group.first.summary['seed']}"
    history = group.first.history
    start = history[0].rank_changes[:1] if history else []  # all ranks at step 0
    states = [ranks for _, ranks in start] + [epoch.ranks for epoch in history]
    if history and history[-1].ranks and any(ranks != states[0] for ranks in states):
        figure = rank_figure(history)
        caption = f"Ranks over training: {subject}"
        yield Picture(name=f"ranks-{number}", figure=figure, caption=caption)
    if spectra:
        lines = {
            layer: [(range(1, 1 + len(values)), values) for values in modes]
            for layer, modes in spectra.items()
        }
        figure = layer_figure(lines, "index", "singular value / largest singular value")
        for axes in figure.axes:
            axes.set_yscale("log")
        caption = f"Singular values of the cores after training: {subject}"
        yield Picture(name=f"spectra-{number}", figure=figure, caption=caption)
