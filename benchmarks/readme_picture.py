"""Draw docs/figures/accuracy.svg from the results that the README shows.

python benchmarks/readme_picture.py
"""

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comparisons import EXPERIMENTS, IN_PICTURE, ROOT, recorded
from results_table import compared
from tdlrt_lab.methods import METHODS
from tdlrt_lab.reports.groups import Section
from tdlrt_lab.sweep.plan import read_sweep

PICTURE = ROOT / "docs/figures/accuracy.svg"

LABELS = {
    "dense": "dense",
    "tdlrt": "TDLRT, ranks found within a budget",
    "tucker": "factors trained directly, ranks by hand",
}
COLOURS = {"dense": "#7a7a7a", "tdlrt": "#1f5fa8", "tucker": "#d1651a"}
MARKERS = {"tdlrt": "o", "tucker": "s"}


def main() -> None:
    figure = draw([compared(read_sweep(EXPERIMENTS[name]), recorded(name)) for name in IN_PICTURE])
    with matplotlib.rc_context({"svg.hashsalt": "tdlrt"}):  # the same bytes every time
        figure.savefig(PICTURE, metadata={"Date": None})
    print(f"wrote {PICTURE}")


def draw(experiments: Sequence[Section]) -> Figure:
    """A panel for each experiment."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    figure.patch.set_facecolor("white")
    panels = figure.subplots(1, len(experiments), squeeze=False)[0]
    for axes, section in zip(panels, experiments, strict=True):
        draw_panel(axes, section)
    handles = {}
    for axes in panels:
        handles |= {label: h for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9
    )
    return figure


def draw_panel(axes: Axes, section: Section) -> None:
    """Mean and standard deviation over the seeds of each setting; dense as a band."""
    for group in section.groups:
        method = group.first.summary["method"]
        mean, deviation = group.mean("accuracy"), group.deviation("accuracy")
        colour = COLOURS.get(method, f"C{list(METHODS).index(method)}")
        style = {"color": colour, "label": LABELS.get(method, method)}
        if method == "dense":
            axes.axhspan(mean - deviation, mean + deviation, color=colour, alpha=0.15, lw=0)
            axes.axhline(mean, linestyle="--", **style)
        else:
            axes.errorbar(
                100 * group.mean("compression"),
                mean,
                deviation,
                100 * group.deviation("compression"),
                marker=MARKERS.get(method, "^"),
                linestyle="none",
                capsize=3,
                **style,
            )
    counts = sorted({len(group.runs) for group in section.groups})
    seeds = " to ".join(map(str, (counts[0], counts[-1]) if len(counts) > 1 else counts))
    noun = "seed" if counts == [1] else "seeds"
    axes.set_title(f"{section.title}, {seeds} {noun}", fontsize=10)
    axes.set_xlabel("compression of the factorised layers (%)")
    axes.set_ylabel("test accuracy (%)")
    axes.margins(x=0.15, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
