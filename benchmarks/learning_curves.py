"""How long VGG16 trains until it is as accurate as the dense network: accuracy by epoch and time.

    python benchmarks/accuracy.py --data-dir DIR --only cifar10_vgg16_40
    python benchmarks/learning_curves.py

Reads what the first command left in runs/. Both rows have to train at the same time, one thread
each, for their times to be comparable. Writes benchmarks/results/learning_curves.json and a section
of docs/integrator-cost.md.
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
ROWS = {"dense": "dense", "tdlrt": "budget_0.05"}
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
    """Accuracy, seconds since the start and compression after each epoch of both rows.

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


def first(curve: Row, accuracy: float) -> int | None:
    """Index of the first epoch that ends with this accuracy or more; None if none does."""
    return next((n for n, value in enumerate(curve["accuracy"]) if value >= accuracy), None)


def section(result: Row) -> list[str]:
    """Lines of the section."""
    dense, tdlrt = (result["rows"][name] for name in ROWS)
    end, whole = dense["accuracy"][-1], dense["seconds"][-1]
    times = []
    for points in POINTS:
        wanted = round(end - points, 2)
        places = [(curve, first(curve, wanted)) for curve in (dense, tdlrt)]
        taken = [None if n is None else curve["seconds"][n] for curve, n in places]
        times.append(
            [
                f"{points:g}",
                f"{wanted:.2f}",
                *("not" if n is None else str(n + 1) for _, n in places),
                *("" if s is None else f"{s / 3600:.2f}" for s in taken),
                "" if None in taken else f"{taken[1] / taken[0]:.2f}",
                "" if taken[1] is None else f"{taken[1] / whole:.2f}",
            ]
        )
    epochs = [
        [
            str(n + 1),
            *(f"{curve['accuracy'][n]:.2f}" for curve in (dense, tdlrt)),
            *(f"{curve['seconds'][n] / 3600:.2f}" for curve in (dense, tdlrt)),
            f"{100 * tdlrt['compression'][n]:.1f}",
        ]
        for n in range(SHOWN - 1, len(dense["accuracy"]), SHOWN)
    ]
    return [*table_section(result, TEXT, EPOCHS, epochs), "", BELOW, "", *table(TIMES, times)]


EPOCHS = (
    *("epoch", "dense (%)", "tdlrt (%)", "dense (hours)", "tdlrt (hours)"),
    "compression of tdlrt (%)",
)
TIMES = (
    *("points below", "test accuracy (%)", "epoch of dense", "epoch of tdlrt"),
    *("dense (hours)", "tdlrt (hours)", "tdlrt / dense", "tdlrt / all epochs of dense"),
)
TEXT = """\
VGG16 on CIFAR-10, 40 epochs, batch 256, bfloat16: test accuracy after an epoch and hours from the
start on, evaluation included. Both trainings ran at the same time until their 33rd epoch, with one
thread each, on a machine where they slow each other down; the last seven epochs of tdlrt ran alone,
and those of dense beside another training."""
BELOW = """\
When the test accuracy first was so many points below that of dense after its last epoch:"""


if __name__ == "__main__":
    main()
