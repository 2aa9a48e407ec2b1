"""Draw docs/figures/accuracy.svg from the results that the README shows.

python benchmarks/readme_picture.py
"""

import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comparisons import EXPERIMENTS, RESULTS, Experiment
from results_table import grouped, title
from tdlrt_lab.methods import METHODS
from tdlrt_lab.run.results import read_results

PICTURE = Path(__file__).parent.parent / "docs" / "figures" / "accuracy.svg"

LABELS = {
    "dense": "dense",
    "tdlrt": "TDLRT, ranks found within a budget",
    "tucker": "factors trained directly, ranks by hand",
}
COLOURS = {"dense": "#7a7a7a", "tdlrt": "#1f5fa8", "tucker": "#d1651a"}
MARKERS = {"tdlrt": "o", "tucker": "s"}

Result = dict[str, Any]


def main() -> None:
    names = [name for name in EXPERIMENTS if EXPERIMENTS[name].in_readme]
    results = {name: read_results(RESULTS / name) for name in names}
    figure = draw({name: (EXPERIMENTS[name], group) for name, group in results.items()})
    with matplotlib.rc_context({"svg.hashsalt": "tdlrt"}):  # the same bytes every time
        figure.savefig(PICTURE, metadata={"Date": None})
    print(f"wrote {PICTURE}")


def draw(experiments: dict[str, tuple[Experiment, list[Result]]]) -> Figure:
    """A panel for each experiment."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    figure.patch.set_facecolor("white")
    panels = figure.subplots(1, len(experiments), squeeze=False)[0]
    for axes, (experiment, results) in zip(panels, experiments.values(), strict=True):
        draw_panel(axes, experiment, results)
    handles = {}
    for axes in panels:
        handles |= {label: h for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9
    )
    return figure


def draw_panel(axes: Axes, experiment: Experiment, results: list[Result]) -> None:
    """Mean and standard deviation over the seeds of each setting; dense as a band."""
    groups = [group for _, group in grouped(experiment, results)]
    for group in groups:
        method = group[0]["method"]
        mean, deviation = spread([result["accuracy"] for result in group])
        size, size_deviation = spread([100 * result["compression"] for result in group])
        colour = COLOURS.get(method, f"C{list(METHODS).index(method)}")
        style = {"color": colour, "label": LABELS.get(method, method)}
        if method == "dense":
            axes.axhspan(mean - deviation, mean + deviation, color=colour, alpha=0.15, lw=0)
            axes.axhline(mean, linestyle="--", **style)
        else:
            axes.errorbar(
                size,
                mean,
                deviation,
                size_deviation,
                marker=MARKERS.get(method, "^"),
                linestyle="none",
                capsize=3,
                **style,
            )
    counts = sorted({len(group) for group in groups})
    seeds = " to ".join(map(str, (counts[0], counts[-1]) if len(counts) > 1 else counts))
    noun = "seed" if counts == [1] else "seeds"
    axes.set_title(f"{title(experiment)}, {seeds} {noun}", fontsize=10)
    axes.set_xlabel("compression of the factorised layers (%)")
    axes.set_ylabel("test accuracy (%)")
    axes.margins(x=0.15, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation, 0 for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
