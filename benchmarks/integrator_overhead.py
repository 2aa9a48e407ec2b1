"""Time of the integrators next to forward and backward, and how it grows with width and rank.

    python benchmarks/integrator_overhead.py

VGG16 for 32x32 images: the integrator is what a step takes beside its forward and backward passes.
The dense network with torch's optimiser is measured in the same run, in torch's default layout and
in channels_last; the Tucker network is in channels_last. Ranks stay at their start: the fixed-rank
steps by their policy, the others because the step size and the tolerance are too small to move
them. Then one 3x3 convolution of n channels at ranks n/10 and n/5, the step alone. Every figure is
the median of several steps. Writes benchmarks/results/integrator_overhead.json,
docs/integrator-cost.md, with the sections of `operations.py`, `resting_bases.py`,
`linear_tensors.py` and `learning_curves.py`, and docs/figures/integrator_scaling.svg.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import learning_curves
import linear_tensors
import operations
import resting_bases
import tdlrt
from allocator import keep_freed_memory
from tdlrt_lab.models import build_model
from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.files import write_text

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]

EXAMINED = tdlrt.RelativeTolerance(0.01)
CASES: list[Row] = [
    {"integrator": "parallel", "rank_policy": tdlrt.FixedRank()},
    {"integrator": "parallel", "rank_policy": EXAMINED, "adapt_every": 10},
    {"integrator": "parallel", "rank_policy": EXAMINED, "adapt_every": 1},
    {"integrator": "bug", "rank_policy": EXAMINED, "adapt_every": 1},
]
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], Row]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-6, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 1e-8}),
}
# Rank, batch, optimisers. The integrator's time does not depend on the batch: one more suffices.
SETTINGS = [
    (0.2, 64, ("SGD", "Adam")),
    (0.1, 64, ("SGD", "Adam")),
    (0.2, 256, ("SGD",)),
]
WIDTHS = (64, 128, 256, 512, 1024)
SHARES = (0.1, 0.2)
# Below this width the time is that of calls, above it that of arithmetic.
ARITHMETIC = 256

HEADER = """\
| rank | batch | optimiser | integrator | ranks examined | passes (ms) | integrator (ms) \
| of the step (%) | step of dense (%) |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each case")
    parser.add_argument("--out", type=Path, default=ROOT, help="where to write; the repository")
    arguments = parser.parse_args()
    keep_freed_memory()
    rows = []
    for rank, batch, optimizers in SETTINGS:
        for optimizer in optimizers:
            dense_ms = measure_dense(batch, optimizer, arguments.steps)
            for case in CASES:
                row = measure(rank, batch, optimizer, case, arguments.steps)
                rows.append(row | {"dense_ms": dense_ms})
                print(line(rows[-1]), flush=True)
    scaling = measure_scaling(arguments.steps)
    result = {
        **made_by("python benchmarks/integrator_overhead.py", "matplotlib"),
        "rows": rows,
        "scaling": scaling,
        "slopes": slopes(scaling),
    }
    write(result, arguments.out)


def write(result: Row, folder: Path) -> None:
    """Write the result file, the page and the figure."""
    for name in ("benchmarks/results", "docs/figures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    data, page = "benchmarks/results/integrator_overhead.json", "docs/integrator-cost.md"
    write_text(folder / data, json.dumps(result, indent=2) + "\n")
    (folder / page).write_text(document(result), encoding="utf-8")
    operations.fill(folder / page)
    resting_bases.fill(folder / page)
    linear_tensors.fill(folder / page)
    learning_curves.fill(folder / page)
    with matplotlib.rc_context({"svg.hashsalt": "tdlrt"}):  # the same bytes every time
        draw(result["scaling"]).savefig(
            folder / "docs/figures/integrator_scaling.svg", metadata={"Date": None}
        )


# --- a network ----------------------------------------------------------------------------------


def measure_dense(batch: int, optimizer: str, steps: int) -> Row:
    """Median time of a whole training step of the dense network in both layouts, in ms."""
    optimizer_cls, options = OPTIMIZERS[optimizer]
    times = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        model, images, labels = problem(batch, None, layout)
        plain = optimizer_cls(model.parameters(), **options)
        samples = [timed_step(model, plain, images, labels) for _ in range(steps + 2)][2:]
        times[str(layout).removeprefix("torch.")] = 1e3 * statistics.median(map(sum, samples))
    return times


def measure(rank: float, batch: int, optimizer: str, case: Row, steps: int) -> Row:
    """Median times of one integrator."""
    model, images, labels = problem(batch, rank, torch.channels_last)
    optimizer_cls, options = OPTIMIZERS[optimizer]
    integrator = tdlrt.TDLRT(model, optimizer_cls, **options, **case)
    ranks = tdlrt.summary(model).ranks
    group = case.get("adapt_every", 1)
    # In groups of adapt_every, so that steps of both kinds count as often as in a training.
    count = group * max(1, steps // group)
    samples = [timed_step(model, integrator, images, labels) for _ in range(2 + count)][2:]
    passes, step = (
        [statistics.mean(part[i : i + group]) for i in range(0, count, group)]
        for part in zip(*samples, strict=True)
    )
    return {
        "rank": rank,
        "batch": batch,
        "optimizer": optimizer,
        "integrator": case["integrator"],
        "ranks": "fixed" if case["rank_policy"] == tdlrt.FixedRank() else "examined",
        "adapt_every": group,
        "passes_ms": 1e3 * statistics.median(passes),
        "step_ms": 1e3 * statistics.median(step),
        "ranks_moved": tdlrt.summary(model).ranks != ranks,
    }


def problem(
    batch: int, rank: float | None, layout: torch.memory_format
) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, dense or factorised, and a batch of noise."""
    torch.manual_seed(0)
    model = build_model("vgg16", (3, 32, 32), 10)
    if rank is not None:
        tdlrt.factorize_(model, rank=rank)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    return model.to(memory_format=layout), images.to(memory_format=layout), labels


def timed_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> tuple[float, float]:
    """Seconds in forward and backward passes, and in the rest of one step."""
    spent = 0.0

    def closure() -> Tensor:
        nonlocal spent
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images).flatten(1), labels)
        loss.backward()
        spent += time.perf_counter() - start
        return loss

    step: Callable[[Callable[[], Tensor]], Any] = optimizer.step
    start = time.perf_counter()
    step(closure)
    return spent, time.perf_counter() - start - spent


# --- one layer ----------------------------------------------------------------------------------


def measure_scaling(steps: int) -> list[Row]:
    """Median time of a step of one 3x3 convolution, by width and rank."""
    rows = []
    labels = torch.zeros(16, dtype=torch.long)
    for share in SHARES:
        for width in WIDTHS:
            rank = round(share * width)
            for policy, name in ((tdlrt.FixedRank(), "fixed"), (EXAMINED, "examined")):
                torch.manual_seed(0)
                layer = tdlrt.nn.TuckerConv2d(width, width, 3, rank=(rank, rank, 3, 3))
                model, images = nn.Sequential(layer), torch.randn(16, width, 10, 10)
                optimizer = tdlrt.TDLRT(
                    model, torch.optim.SGD, lr=1e-6, momentum=0.9, rank_policy=policy
                )
                samples = [timed_step(model, optimizer, images, labels) for _ in range(steps + 2)]
                milliseconds = 1e3 * statistics.median(step for _, step in samples[2:])
                rows.append(
                    {
                        "width": width,
                        "rank": rank,
                        "share": share,
                        "ranks": name,
                        "ms": milliseconds,
                    }
                )
                print(rows[-1], flush=True)
    return rows


def slopes(rows: Sequence[Row]) -> list[Row]:
    """Exponents p of time ~ n^p along each line of the figure, by least squares on logarithms."""
    found = []
    for ranks, share, line in lines(rows):
        points = [
            (math.log(row["width"]), math.log(row["ms"]))
            for row in line
            if row["width"] >= ARITHMETIC
        ]
        slope = statistics.linear_regression(*zip(*points, strict=True)).slope
        found.append({"ranks": ranks, "share": share, "slope": slope})
    return found


def lines(rows: Sequence[Row]) -> list[tuple[str, float, list[Row]]]:
    return [
        (ranks, share, [r for r in rows if r["ranks"] == ranks and r["share"] == share])
        for ranks in ("fixed", "examined")
        for share in SHARES
    ]


def draw(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    colors = {"fixed": "#1f77b4", "examined": "#d62728"}
    for ranks, share, line in lines(rows):
        axes.loglog(
            [row["width"] for row in line],
            [row["ms"] for row in line],
            color=colors[ranks],
            linestyle="-" if share == max(SHARES) else "--",
            marker="o",
            label=f"ranks {ranks}, r = {share:g} n",
        )
    start = max(row["ms"] for row in rows if row["width"] == ARITHMETIC)
    guide = [n for n in WIDTHS if n >= ARITHMETIC]
    axes.loglog(guide, [start * (n / ARITHMETIC) ** 3 for n in guide], ":", color="#999999")
    axes.annotate("$n^3$", (guide[-1], start * (guide[-1] / ARITHMETIC) ** 3), color="#999999")
    axes.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
    axes.minorticks_off()
    axes.set_xlabel("channels n")
    axes.set_ylabel("integrator, one layer (ms)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


# --- the page -----------------------------------------------------------------------------------


def line(row: Row) -> str:
    every = f"every {row['adapt_every']}" if row["ranks"] == "examined" else "never"
    whole = row["passes_ms"] + row["step_ms"]
    return (
        f"| {row['rank']} | {row['batch']} | {row['optimizer']} | {row['integrator']} | {every} "
        f"| {row['passes_ms']:.0f} | {row['step_ms']:.0f} | {100 * row['step_ms'] / whole:.0f} "
        f"| {100 * whole / min(row['dense_ms'].values()):.0f} |"
    )


def document(result: Row) -> str:
    """The page docs/integrator-cost.md."""
    facts = [
        ", ".join(f"{key} {value}" for key, value in result[name].items())
        for name in ("versions", "machine")
    ]
    table = "\n".join(line(row) for row in result["rows"])
    fitted = "\n".join(
        f"| {row['ranks']} | {row['share']:g} n | {row['slope']:.2f} |" for row in result["slopes"]
    )
    return f"""\
# What the integrators cost

How much of a training step goes into the integrator, beyond the passes through the network, and how
does that grow with width and rank? This page gives times and counts of operations.

Written by `{result["command"]}`; do not edit.

## Beside forward and backward passes

VGG16 for 32x32 images, *rank* of the channels of every mode, SGD with momentum 0.9 or Adam, in
channels_last. *Passes* is the time of the forward and backward passes of a step (two of them for
`bug`, the second in the augmented bases), *integrator* the time of the rest of the step, and *of
the step* its share. *Step of dense* is the whole step relative to that of the dense network with
torch's optimiser, measured in the same run in the faster of torch's default layout and
channels_last. The allocator keeps freed memory ([why](training-loops.md#time-on-a-cpu)).

Layers of similar size take their steps in one batch.

{HEADER}
{table}

The integrator's time does not depend on the batch. Ranks stay at their start here; in a training
they fall, and the integrator's time with them.

## Operations, and whole steps

<!-- operations -->
<!-- end of operations -->

## Bases at rest

`TDLRT(basis_every=k)` moves the bases in one of k steps and the cores in every step. It is meant
for wide linear layers at small batches, where the bases take most of a step's time. As the table
shows, a network learns more slowly then, in the same number of steps; so the default is 1.

<!-- resting_bases -->
<!-- end of resting_bases -->

## Linear layers as tensors

A wide linear layer behind a flattened feature map spends most of its step on the basis of its
inputs. As a tensor (`factorize_(reshape=...)`) it has a basis for the channels and small ones for
height and width instead.

<!-- linear_tensors -->
<!-- end of linear_tensors -->

## A whole training

A budget costs most before it falls: ranks start at half of the channels, and the first epochs take
longer than dense ones. What is left afterwards is much faster. A start at a quarter of the channels
(`--rank 0.25 --budget-start 0.2`) needs less than half of the dense network's time for the same
epochs, and costs a point of accuracy.

<!-- learning_curves -->
<!-- end of learning_curves -->

## Growth with width and rank

One 3x3 convolution with n input and n output channels, SGD with momentum 0.9.

![Time of the integrator against the width](figures/integrator_scaling.svg)

A step at rank r costs O(n r^2 + k r^3) operations for a kernel of k entries, which is n^3 along
each line. Fitted exponents from n = {ARITHMETIC} up; below, the time is that of the calls:

| ranks | r | time ~ n^p, p |
| --- | --- | --- |
{fitted}

{facts[0]}; {facts[1]}
"""


if __name__ == "__main__":
    main()
