"""How long VGG16 trains until it is as accurate as the dense network: accuracy by epoch and time.

    python benchmarks/accuracy.py --data-dir DIR --only cifar10_vgg16_40
    python benchmarks/learning_curves.py

Reads what the first command left in runs/. Each row has to train beside another training, with one
thread, for their times to be comparable. Writes benchmarks/results/learning_curves.json and a
section of docs/integrator-cost.md.
"""

import argparse
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

from operations import table, table_section
from tdlrt_lab.documents import fill_section
from tdlrt_lab.run.files import write_text
from tdlrt_lab.run.results import RunDirectory

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/learning_curves.json"
DOCUMENT = ROOT / "docs/integrator-cost.md"
EXPERIMENT, SEED = "cifar10_vgg16_40", 1
ROWS = {
    "dense": "dense",
    "tdlrt": "budget_0.05",
    "tdlrt, rank 0.25": "budget_0.05_rank_0.25",
}
SHOWN = 5
"""Every so many epochs are shown."""
POINTS = (3.0, 2.0, 1.0, 0.5, 0.0)
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--fill", action="store_true", help="only write the section")
    arguments = parser.parse_args()
    if not arguments.fill:
        write_text(RESULT, json.dumps(curves(arguments.runs), indent=1) + "\n")
    fill(DOCUMENT)


def fill(document: Path) -> None:
    """Put what was measured between the marks of a document."""
    fill_section(document, "learning_curves", section(json.loads(RESULT.read_text("utf-8"))))


def curves(runs: Path) -> Row:
    """Accuracy, seconds since the start and compression after each epoch of all rows.

    Raises:
        RunError: A run has not ended.
    """
    found: Row = {}
    for name, row in ROWS.items():
        directory = RunDirectory(runs / EXPERIMENT / row / f"seed{SEED}")
        summary = directory.read_summary()
        history = directory.read_metrics()
        found[name] = {
            "accuracy": [epoch.accuracy for epoch in history],
            "seconds": list(accumulate(round(epoch.seconds, 1) for epoch in history)),
            "compression": [round(epoch.compression, 4) for epoch in history],
        }
    return {
        "command": "python benchmarks/learning_curves.py",
        "experiment": EXPERIMENT,
        "seed": SEED,
        "versions": summary["versions"],
        "machine": summary["machine"],
        "rows": found,
    }


def reached(curve: Row, accuracy: float) -> tuple[int, float] | None:
    """The first epoch that ends with this accuracy or more, and when; None if none does."""
    ends = zip(curve["accuracy"], curve["seconds"], strict=True)
    found = ((n, at) for n, (value, at) in enumerate(ends, 1) if value >= accuracy)
    return next(found, None)


def section(result: Row) -> list[str]:
    """Lines of the section."""
    rows = result["rows"]
    dense, others = rows["dense"], [name for name in rows if name != "dense"]
    end, whole = dense["accuracy"][-1], dense["seconds"][-1]
    times = []
    for points in POINTS:
        wanted = round(end - points, 2)
        places = {name: reached(curve, wanted) for name, curve in rows.items()}
        cells = [f"{points:g}", f"{wanted:.2f}"]
        for place in places.values():
            cells.append("not" if place is None else f"{place[0]}, {place[1] / 3600:.2f}")
        for name in others:
            ours, theirs = places[name], places["dense"]
            if ours is None or theirs is None:
                cells.append("")
            else:
                cells.append(f"{ours[1] / theirs[1]:.2f}, {ours[1] / whole:.2f}")
        times.append(cells)
    epochs = [
        [
            str(n + 1),
            *(
                f"{curve['accuracy'][n]:.2f}, {curve['seconds'][n] / 3600:.2f}"
                for curve in rows.values()
            ),
            *(f"{100 * rows[name]['compression'][n]:.1f}" for name in others),
        ]
        for n in range(SHOWN - 1, len(dense["accuracy"]), SHOWN)
    ]
    shown = ["epoch", *(f"{name} (%, hours)" for name in rows)]
    shown += [f"compression of {name} (%)" for name in others]
    head = ["points below", "test accuracy (%)", *(f"{name} (epoch, hours)" for name in rows)]
    head += [f"{name} / dense, / all epochs of dense" for name in others]
    return [*table_section(result, TEXT, shown, epochs), "", BELOW, "", *table(head, times)]


TEXT = """\
VGG16 on CIFAR-10, 40 epochs, batch 256, bfloat16: test accuracy after an epoch and hours from the
start on, evaluation included. *tdlrt, rank 0.25* begins at a quarter of the channels and a fifth of
the parameters. Each training had one thread on a machine of two cores and ran beside another
training, which slows both down, but for the last epochs of the rows of tdlrt, which ran alone."""
BELOW = """\
When the test accuracy first was so many points below that of dense after its last epoch:"""


if __name__ == "__main__":
    main()
