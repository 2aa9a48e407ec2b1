"""Plots of a run over its epochs: accuracy or bits per character, loss, compression and ranks."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tdlrt.files import write_atomically
from tdlrt_lab.run.files import own_folder
from tdlrt_lab.run.metrics import EpochMetrics
from tdlrt_lab.run.results import RunDirectory

__all__ = ["draw_plots", "layer_figure", "rank_figure", "save_figure"]

NAMES = {"tdlrt": "TDLRT", "tucker": "Tucker", "cp": "CP", "matrix_dlrt": "matrix DLRT"}
COLOUR, DENSE_COLOUR = "#1f5fa8", "#7a7a7a"
MODE_COLOURS = ("#1f5fa8", "#d1651a", "#2c8a57", "#8a4fa3", "#7a7a7a")
MODE_WIDTHS = (4.4, 3.2, 2.2, 1.4, 0.8)  # thin over thick, to show equal ranks
MODE_NAMES = {
    2: ("output", "input"),
    3: ("output", "input", "length"),
    4: ("output", "input", "height", "width"),
    5: ("output", "input", "depth", "height", "width"),
}

MAX_LAYERS = 24
"""Small plots in a figure: each takes a tenth of a second."""

MAX_MODES = 16
"""Lines in a small plot."""

MAX_TITLE = 40
"""Letters of the name of a layer above its small plot."""

MAX_POINTS = 500
"""Points of a line of ranks: a small plot is some 200 pixels wide."""

History = list[EpochMetrics]
Point = tuple[float, list[int]]


def draw_plots(directory: RunDirectory, method: str) -> None:
    """Draw the metrics of a run, and of its dense baseline if there is one, as PNG files.

    Args:
        directory: The run.
        method: The method of the run, for the legend.
    """
    history = directory.read_metrics()
    dense = directory.baseline.read_metrics() if directory.baseline.metrics.exists() else []
    own_folder(directory.plots, within=directory.path)
    curves = {"dense": dense, method: history} if dense else {method: history}
    if history[-1].bits_per_character is None:
        _draw_accuracy(curves, directory.plots / "accuracy.png")
    else:
        _draw_bits(curves, directory.plots / "bits_per_character.png")
    _draw_loss(curves, directory.plots / "loss.png")
    if method != "dense":
        _draw_compression(history, directory.plots / "compression.png")
    if history[-1].ranks:
        save_figure(rank_figure(history), directory.plots / "ranks.png")


def _draw_accuracy(curves: Mapping[str, History], path: Path) -> None:
    """Held-out and training accuracy of each method; the baseline is drawn first."""
    figure, axes = _chart("accuracy (%)")
    for method, epochs in curves.items():
        name, colour = _style(method)
        held_out = [metrics.accuracy for metrics in epochs]
        train = [metrics.train_accuracy for metrics in epochs]
        label = f"{name}, {epochs[-1].split}: {held_out[-1]:.2f}"
        _line(axes, epochs, held_out, label, colour)
        _line(axes, epochs, train, f"{name}, training", colour, dashed=True)
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, path)


def _draw_bits(curves: Mapping[str, History], path: Path) -> None:
    """Held-out and training bits per character of each method; the baseline is drawn first."""
    figure, axes = _chart("bits per character")
    for method, epochs in curves.items():
        name, colour = _style(method)
        held_out = [metrics.bits_per_character or math.nan for metrics in epochs]
        train = [metrics.loss / math.log(2) for metrics in epochs]
        label = f"{name}, {epochs[-1].split}: {held_out[-1]:.3f}"
        _line(axes, epochs, held_out, label, colour)
        _line(axes, epochs, train, f"{name}, training", colour, dashed=True)
    axes.legend(frameon=False, loc="upper right")
    save_figure(figure, path)


def _style(method: str) -> tuple[str, str]:
    """Display name and colour of a method."""
    return NAMES.get(method, method), DENSE_COLOUR if method == "dense" else COLOUR


def _draw_loss(curves: Mapping[str, History], path: Path) -> None:
    figure, axes = _chart("training loss")
    for method, epochs in curves.items():
        loss = [metrics.loss for metrics in epochs]
        name, colour = _style(method)
        _line(axes, epochs, loss, f"{name}: {loss[-1]:.2g}", colour)
    axes.set_yscale("log")
    axes.legend(frameon=False)
    save_figure(figure, path)


def _draw_compression(history: History, path: Path) -> None:
    figure, axes = _chart("parameters saved (%)")
    weights = [100 * metrics.compression for metrics in history]
    network = [100 * metrics.network_compression for metrics in history]
    label = f"compressed layers: {weights[-1]:.1f}"
    _line(axes, history, weights, label, COLOUR)
    label = f"whole network: {network[-1]:.1f}"
    _line(axes, history, network, label, COLOUR, dashed=True)
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path, *, dpi: float | str = "figure") -> None:
    """Write a figure as PNG, atomically.

    Raises:
        OSError: It cannot be written.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # keep the layout just computed
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def rank_figure(history: History) -> Figure:
    """Ranks over the epochs: one small plot per layer, one line per mode.

    The lines have a step at each change. Runs of earlier versions recorded no changes; their lines
    lead from the end of one epoch to that of the next.
    """
    points: dict[str, list[Point]] = {layer: [] for layer in history[-1].ranks}
    for metrics in history:
        for step, changed in metrics.rank_changes:
            for layer in changed.keys() & points.keys():
                points[layer].append((step * metrics.epoch / metrics.steps, changed[layer]))
        for layer in metrics.ranks.keys() & points.keys():
            points[layer].append((metrics.epoch, metrics.ranks[layer]))
    lines = {}
    for layer, known in points.items():
        epochs, ranks = zip(*_thinned(known), strict=True)
        lines[layer] = [(epochs, mode) for mode in zip(*ranks, strict=True)]
    figure = layer_figure(lines, "epoch", "rank")
    has_changes = any(metrics.rank_changes for metrics in history)
    for axes in figure.axes:
        for line in axes.lines:
            line.set_drawstyle("steps-post" if has_changes else "default")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.set_ylim(bottom=0)
    return figure


def _thinned(points: list[Point]) -> list[Point]:
    """All points if there are few, else as many at equal distances in the list, and the last."""
    stride = math.ceil(len(points) / MAX_POINTS)
    return points if stride == 1 else [*points[:-1:stride], points[-1]]


def layer_figure(
    layers: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]], x: str, y: str
) -> Figure:
    """One small plot per layer, one line (x values, y values) per mode.

    Args:
        layers: The lines of each layer, in the order of its modes. The first 24 layers are drawn,
            and of each the first 16 modes.
        x: Label of all horizontal axes.
        y: Label of all vertical axes.
    """
    if len(layers) > MAX_LAYERS:
        x += f" (the first {MAX_LAYERS} of {len(layers):,} layers)"
        layers = dict(itertools.islice(layers.items(), MAX_LAYERS))
    if (modes := max(map(len, layers.values()))) > MAX_MODES:
        x += f" (the first {MAX_MODES} of {modes:,} modes)"
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(
        figsize=(max(6.0, 2.6 * columns), 2.2 * rows + 0.7), dpi=120, layout="constrained"
    )
    shown = {}
    for number, (layer, lines) in enumerate(layers.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_title(layer[:MAX_TITLE], fontsize=9, parse_math=False)
        for mode, (xs, ys) in enumerate(lines[:MAX_MODES]):
            (shown[_mode_label(len(lines), mode)],) = axes.plot(
                xs,
                ys,
                color=MODE_COLOURS[mode % len(MODE_COLOURS)],
                linewidth=MODE_WIDTHS[mode % len(MODE_WIDTHS)],
                marker="o" if len(xs) == 1 else None,
            )
        _tidy(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    figure.legend(
        shown.values(),
        list(shown),
        loc="outside upper center",
        ncols=len(shown),
        frameon=False,
    )
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    return figure


def _mode_label(order: int, mode: int) -> str:
    """The name of a mode; a linear layer may have more modes than have names."""
    return f"{MODE_NAMES[order][mode]} mode" if order in MODE_NAMES else f"mode {mode + 1}"


def _chart(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    _tidy(axes)
    return figure, axes


def _tidy(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _line(
    axes: Axes, epochs: History, values: list[float], label: str, colour: str, dashed: bool = False
) -> None:
    axes.plot(
        [metrics.epoch for metrics in epochs],
        values,
        label=label,
        color=colour,
        linestyle="--" if dashed else "-",
        linewidth=1.0 if dashed else 1.8,
        marker=None if dashed and len(epochs) > 1 else "o",
        markersize=3.5,
    )
