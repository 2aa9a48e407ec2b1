"""The pictures of a section, each with the words that stand beside it."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tdlrt_lab.reports.collect import Group, Run, Section
from tdlrt_lab.reports.style import DASHES, GREY, SERIES
from tdlrt_lab.run.plots import layer_figure, rank_figure

__all__ = ["Picture", "overview", "per_layer"]

SIZE = (4.5, 3.5)
MOST_CURVES = 10
NARROW = 4.0
SENSITIVITY = {"rank": "rank at the start", "lr": "learning rate", "tau": "tolerance tau"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure.

    Attributes:
        name: For file names.
        figure: The drawing.
        caption: What it shows.
    """

    name: str
    figure: Figure
    caption: str


def overview(section: Section) -> list[Picture]:
    """The pictures that compare groups: those for which there are numbers."""
    pictures = [_compression(section), _time(section), _latency(section), _curves(section)]
    pictures += [_sensitivity(section, option) for option in SENSITIVITY]
    return [picture for picture in pictures if picture is not None]


def _compression(section: Section) -> Picture | None:
    """The paper's figure 1."""
    if not section.series:
        return None
    figure, axes = _chart("compression of the factorised layers (%)", "accuracy (%)")
    for group in section.references:
        mean, spread = group.mean("accuracy"), group.deviation("accuracy")
        axes.axhline(mean, color=GREY, linestyle="--", linewidth=1.2, label=group.label)
        axes.axhspan(mean - spread, mean + spread, color=GREY, alpha=0.15, linewidth=0)
    _lines(axes, section, lambda g: (100 * g.mean("compression"), 100 * g.deviation("compression")))
    left, right = axes.get_xlim()
    if right - left < NARROW:  # equal sizes: no hundredths on the axis
        axes.set_xlim((left + right - NARROW) / 2, (left + right + NARROW) / 2)
    _legend(figure)
    caption = "Accuracy against compression, mean and standard deviation over the seeds"
    return Picture(name="accuracy-compression", figure=figure, caption=caption)


def _time(section: Section) -> Picture:
    figure, axes = _chart("training time (s)", "accuracy (%)")
    _dots(axes, section.references, lambda g: (g.mean("seconds"), g.deviation("seconds")))
    _lines(axes, section, lambda g: (g.mean("seconds"), g.deviation("seconds")))
    axes.set_xlim(left=0)
    _legend(figure)
    caption = "Accuracy against training time, as measured in these runs"
    return Picture(name="accuracy-time", figure=figure, caption=caption)


def _latency(section: Section) -> Picture | None:
    measured = [g for g in section.groups if g.values("latency_ms")]
    if not measured:
        return None
    figure, axes = _chart("time of a forward pass (ms)", "accuracy (%)")
    place = lambda g: (g.mean("latency_ms"), g.deviation("latency_ms"))  # noqa: E731
    _dots(axes, [g for g in section.references if g in measured], place)
    _lines(axes, section, place, measured)
    dense = statistics.mean(v for g in measured for v in g.values("dense_latency_ms"))
    axes.axvline(dense, color=GREY, linestyle=":", linewidth=1.2, label="dense, measured beside")
    axes.set_xlim(left=0)
    _legend(figure)
    caption = "Accuracy against the measured time of a forward pass of the plain network"
    return Picture(name="accuracy-latency", figure=figure, caption=caption)


def _curves(section: Section) -> Picture | None:
    """Accuracy and loss over the epochs."""
    groups = _some([g for g in section.groups if all(run.history for run in g.runs)])
    if not groups:
        return None
    figure = Figure(figsize=(SIZE[0], 1.5 * SIZE[1]), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for group, colour, dash in _styles(section, groups):
        _band(upper, group, "accuracy", colour, dash)
        _band(lower, group, "loss", colour, dash)
    upper.set_ylabel("accuracy (%)")
    lower.set_ylabel("training loss")
    lower.set_yscale("log")
    lower.set_xlabel("epoch")
    for axes in (upper, lower):
        _tidy(axes)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure)
    caption = "Convergence: mean over the seeds, and one standard deviation around it"
    return Picture(name="convergence", figure=figure, caption=caption)


def _some(groups: Sequence[Group]) -> list[Group]:
    """All groups, or the least and the most compressed of each line where there are many."""
    if len(groups) <= MOST_CURVES:
        return list(groups)
    ends: dict[str, list[Group]] = {}
    for group in groups:
        ends[group.series] = [*ends.get(group.series, [])[:1], group]
    return [group for pair in ends.values() for group in pair]


def _band(axes: Axes, group: Group, name: str, colour: str, dash: Any) -> None:
    """Mean over the seeds of a number at each epoch that all of them reached, if it is finite."""
    columns = list(
        zip(*([getattr(epoch, name) for epoch in run.history] for run in group.runs), strict=False)
    )
    epochs = range(1, len(columns) + 1)
    means = [statistics.mean(column) for column in columns]
    spreads = [
        statistics.stdev(column) if len(column) > 1 and math.isfinite(mean) else 0.0
        for column, mean in zip(columns, means, strict=True)
    ]
    marker = "o" if len(columns) == 1 else None
    axes.plot(epochs, means, color=colour, linestyle=dash, marker=marker, label=group.label)
    if any(spreads):
        lower = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        upper = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        axes.fill_between(epochs, lower, upper, color=colour, alpha=0.15, linewidth=0)


def _sensitivity(section: Section, option: str) -> Picture | None:
    """Accuracy and compression against an option, where it varies and nothing else does."""
    lines: dict[str, dict[float, Group]] = {}
    for group in section.groups:
        value = _number(group.first, option)
        if value is not None and not group.dense:
            lines.setdefault(group.label_without(option), {})[value] = group
    lines = {label: points for label, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    figure = Figure(figsize=(SIZE[0], 1.5 * SIZE[1]), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    colours = _colours(section)
    if not lines.keys() <= colours.keys():  # not the lines of the other pictures
        colours = dict(zip(lines, SERIES * len(lines), strict=False))
    for label, points in lines.items():
        values = sorted(points)
        groups = [points[value] for value in values]
        _errors(upper, values, groups, "accuracy", 1, colours[label], label)
        _errors(lower, values, groups, "compression", 100, colours[label], label)
    upper.set_ylabel("accuracy (%)")
    lower.set_ylabel("compression (%)")
    lower.set_xlabel(SENSITIVITY[option])
    every = [value for points in lines.values() for value in points]
    if min(every) > 0 and max(every) / min(every) > 5:
        lower.set_xscale("log")
    else:
        lower.xaxis.set_major_locator(MaxNLocator(6))
    for axes in (upper, lower):
        _tidy(axes)
    _legend(figure)
    caption = f"Sensitivity to the {SENSITIVITY[option]}, everything else equal"
    return Picture(name=f"sensitivity-{option}", figure=figure, caption=caption)


def _number(run: Run, option: str) -> float | None:
    """The option as a number, if it is one and means something to the run's method."""
    value = run.summary.get("tau") if option == "tau" else run.config.get(option)
    if option == "rank" and value == "full":
        return 1.0
    return float(value) if isinstance(value, int | float) else None


def _errors(
    axes: Axes,
    xs: Sequence[float],
    groups: Sequence[Group],
    name: str,
    factor: float,
    colour: str,
    label: str,
) -> None:
    means = [factor * group.mean(name) for group in groups]
    spreads = [factor * group.deviation(name) for group in groups]
    axes.errorbar(xs, means, yerr=spreads, color=colour, label=label, marker="o", capsize=3)


Place = Callable[[Group], tuple[float, float]]


def _lines(
    axes: Axes, section: Section, place: Place, among: Sequence[Group] | None = None
) -> None:
    """One line per series of compressed groups, in the order of their compression."""
    colours = _colours(section)
    for label, groups in section.series.items():
        shown = [group for group in groups if among is None or group in among]
        if shown:
            xs, spreads = zip(*(place(group) for group in shown), strict=True)
            axes.errorbar(
                xs,
                [group.mean("accuracy") for group in shown],
                xerr=spreads,
                yerr=[group.deviation("accuracy") for group in shown],
                color=colours[label],
                label=label,
                marker="o",
                markersize=4.5,
                capsize=3,
                linewidth=1.5,
            )


def _colours(section: Section) -> dict[str, str]:
    """One colour per series."""
    return dict(zip(section.series, SERIES * len(section.series), strict=False))


def _dots(axes: Axes, groups: Sequence[Group], place: Place) -> None:
    """Dense groups, each a point."""
    for group, marker in zip(groups, "sD^vPX" * len(groups), strict=False):
        (x, spread), accuracy = place(group), group.mean("accuracy")
        axes.errorbar(
            [x],
            [accuracy],
            xerr=[spread],
            yerr=[group.deviation("accuracy")],
            color=GREY,
            label=group.label,
            marker=marker,
            capsize=3,
            linestyle="none",
        )


def _styles(section: Section, groups: Sequence[Group]) -> Iterator[tuple[Group, str, Any]]:
    """Each group with the colour of its line, told from others of that line by dashes."""
    colours = _colours(section)
    seen: dict[str, int] = {}
    for group in groups:
        colour = GREY if group.dense else colours[group.series]
        number = seen[colour] = seen.get(colour, -1) + 1
        yield group, colour, DASHES[number % len(DASHES)]


def _chart(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    _tidy(axes)
    return figure, axes


def _tidy(axes: Axes) -> None:
    axes.grid(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure) -> None:
    """Below the drawing, each label once; the picture grows by its lines."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    columns = 2 if max(map(len, entries)) < 26 else 1
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(entries) / columns))
    figure.legend(
        entries.values(), entries, loc="outside lower center", ncols=columns, handlelength=2.6
    )


def per_layer(
    section: Section, spectra: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
) -> list[Picture]:
    """Ranks over training and singular values of the cores, of the first seed of each group.

    Args:
        section: Its groups.
        spectra: Singular values by layer and mode, by path of the run.
    """
    pictures = []
    for number, group in enumerate(section.groups, start=1):
        whose = f"{group.label}, seed {group.first.summary['seed']}"
        history = group.first.history
        if history and any(epoch.ranks != history[0].ranks for epoch in history):
            figure = rank_figure(history)
            caption = f"Ranks over training: {whose}"
            pictures.append(Picture(name=f"ranks-{number}", figure=figure, caption=caption))
        if found := spectra.get(group.first.path):
            lines = {
                layer: [(range(1, 1 + len(values)), values) for values in modes]
                for layer, modes in found.items()
            }
            figure = layer_figure(lines, "number", "singular value of the core, relative")
            for axes in figure.axes:
                axes.set_yscale("log")
            caption = f"Singular values of the cores at the end: {whose}"
            pictures.append(Picture(name=f"spectra-{number}", figure=figure, caption=caption))
    return pictures
