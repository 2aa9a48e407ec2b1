"""What bases that rest cost: accuracy of a wide network by `basis_every`, after each epoch.

    python benchmarks/resting_bases.py --data-dir DIR

A perceptron with two hidden layers of 1,024 units on 20,000 images of MNIST, its wide layers at a
tenth of their rank, fixed; batch 64; SGD with momentum and Adam. Writes
benchmarks/results/resting_bases.json, run after run (what is there is not run again), and a section
of docs/integrator-cost.md.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tdlrt
from operations import table_section
from resumable import combinations, measured
from small_training import train_epochs
from tdlrt_lab.data import load_data
from tdlrt_lab.documents import fill_section

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/resting_bases.json"
DOCUMENT = ROOT / "docs/integrator-cost.md"
Row = dict[str, Any]

WIDTH, RANK, BATCH, IMAGES, EPOCHS = 1024, 0.1, 64, 20_000, 5
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], Row]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.001}),
}
PERIODS: Sequence[int | None] = (None, 1, 2, 4, 8, 32)
"""None is the dense network."""
SEEDS = (0, 1)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, 10),
    )


def train(name: str, every: int | None, seed: int, data: Sequence[Tensor]) -> Row:
    """Test accuracy in per cent after each epoch, and the time of all steps."""
    torch.manual_seed(seed)
    model = network()
    optimizer_cls, options = OPTIMIZERS[name]
    if every is None:
        optimizer = optimizer_cls(model.parameters(), **options)
    else:
        tdlrt.factorize_(model, rank=RANK, exclude=["5"])
        policy = tdlrt.FixedRank()
        optimizer = tdlrt.TDLRT(
            model, optimizer_cls, rank_policy=policy, basis_every=every, **options
        )
    trained = list(train_epochs(model, optimizer, data, batch=BATCH, epochs=EPOCHS))
    return {
        "accuracies": [round(epoch.accuracy, 2) for epoch in trained],
        "seconds": round(sum(epoch.seconds for epoch in trained), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with mnist/; default: the hub")
    parser.add_argument("--fill", action="store_true", help="only write the section")
    arguments = parser.parse_args()
    if not arguments.fill:
        measure(arguments.data_dir)
    fill(DOCUMENT)


def fill(document: Path) -> None:
    """Put what was measured between the marks of a document."""
    fill_section(document, "resting_bases", section(json.loads(RESULT.read_text("utf-8"))))


def measure(data_dir: Path | None) -> None:
    """Run what is not there yet."""
    torch.set_num_threads(1)
    sets = load_data("mnist", data_dir=data_dir, train_images=IMAGES)
    images = (sets.normalise(sets.train_images), sets.normalise(sets.test_images))
    data = (images[0], sets.train_labels, images[1], sets.test_labels)
    runs = combinations(seed=SEEDS, optimizer=OPTIMIZERS, basis_every=PERIODS)
    measured(
        *(RESULT, "python benchmarks/resting_bases.py", runs),
        lambda optimizer, basis_every, seed: train(optimizer, basis_every, seed, data),
    )


def section(result: Row) -> list[str]:
    """Lines of the section."""
    cells: dict[tuple[str, int | None], list[Row]] = {}
    for row in result["rows"]:
        cells.setdefault((row["optimizer"], row["basis_every"]), []).append(row)
    head = ["optimiser", "basis_every", "seeds", *(f"epoch {n + 1} (%)" for n in range(EPOCHS))]
    lines = []
    for (name, every), rows in cells.items():
        means = [sum(of) / len(of) for of in zip(*(row["accuracies"] for row in rows), strict=True)]
        first = "dense" if every is None else str(every)
        lines.append([name, first, str(len(rows)), *(f"{mean:.2f}" for mean in means)])
    return table_section(result, TEXT.format(width=WIDTH, images=IMAGES), head, lines)


TEXT = """\
Test accuracy after each epoch of a perceptron with two hidden layers of {width} units on {images}
images of MNIST. The wide layers have a tenth of their rank, which stays fixed; the batch has 64
images. With `basis_every=k` bases move in one of k steps. Learning rates were not tuned."""


if __name__ == "__main__":
    main()
