"""What a first layer costs that keeps a half of the inputs of a network.

    python benchmarks/network_inputs.py

The digits read as 8 signals and as rows (networks and optimisers of first_epochs.py), the wine
of scikit-learn, and a table whose columns all matter, made by its make_classification. Writes
benchmarks/results/network_inputs.json, run after run (what is there is not run again), and a
section of docs/algorithm.md.
"""

from functools import partial
from itertools import product
from pathlib import Path

import torch
from sklearn.datasets import load_wine, make_classification
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from first_epochs import DOCUMENT, NETWORKS, OPTIMIZERS, Row, digits, train
from operations import provenance, table
from resumable import accuracy_at_the_end, combinations, measured
from tdlrt_lab.documents import fill_section

RESULT = Path(__file__).parent / "results/network_inputs.json"

SEEDS = (0, 1, 2)
COLUMNS = 16
EPOCHS = {"digits": 6, "columns": 20, "wine": 30}
CASES: dict[str, tuple[str, str, int | tuple[int, ...]]] = {
    "transformer of rows, norms last": ("digits", "embed", 4),
    "CNN of 8 signals": ("digits", "1", (12, 4, 3)),
    "perceptron, 13 columns of wine": ("wine", "0", 6),
    f"perceptron, {COLUMNS} columns": ("columns", "0", COLUMNS // 2),
}
"""By network: its data, its first layer, and the ranks there that a share of a half stands for."""


def perceptron(columns: int, classes: int) -> nn.Module:
    """Three hidden layers of 128 units."""
    net, features = nn.Sequential(), columns
    for _ in range(3):
        net.extend([nn.Linear(features, 128), nn.ReLU()])
        features = 128
    return net.append(nn.Linear(features, classes))


NETWORKS |= {  # of `train`
    "perceptron, 13 columns of wine": partial(perceptron, 13, 3),
    f"perceptron, {COLUMNS} columns": partial(perceptron, COLUMNS, 5),
}


def columns(name: str) -> list[Tensor]:
    """A table with columns of mean 0 and deviation 1: training rows and labels, then the test's."""
    if name == "wine":
        rows, labels = load_wine(return_X_y=True)
    else:
        sizes = {"n_features": COLUMNS, "n_informative": COLUMNS, "n_redundant": 0}
        rows, labels = make_classification(2000, n_classes=5, random_state=0, **sizes)
    rows = (rows - rows.mean(0)) / rows.std(0)
    parts = train_test_split(rows, labels, test_size=0.3, random_state=0, stratify=labels)
    inputs, test_inputs = (torch.from_numpy(part).float() for part in parts[:2])
    return [inputs, torch.from_numpy(parts[2]), test_inputs, torch.from_numpy(parts[3])]


def starts(first: str, half: int | tuple[int, ...]) -> dict[str, Row | None]:
    """Arguments of `factorize_`; None for the dense network."""
    return {
        "dense": None,
        "half of the inputs": {"rank": {first: half, "*": 0.5}},
        "default": {},
        "first layer dense": {"exclude": first},
    }


STARTS = tuple(starts("", 1))


def main() -> None:
    torch.set_num_threads(1)
    data = {"digits": digits(), "wine": columns("wine"), "columns": columns("columns")}

    def measure(network: str, optimizer: str, seed: int, start: str) -> Row:
        source, first, half = CASES[network]
        given = starts(first, half)[start]
        return {"accuracies": train(network, optimizer, seed, data[source], given, EPOCHS[source])}

    runs = combinations(network=CASES, optimizer=OPTIMIZERS, seed=SEEDS, start=STARTS)
    result = measured(RESULT, "python benchmarks/network_inputs.py", runs, measure)
    fill_section(DOCUMENT, "network_inputs", section(result))


def section(result: Row) -> list[str]:
    """Lines of the section."""
    lines = [
        [
            *(network, optimizer),
            *(
                accuracy_at_the_end(
                    result["rows"], network=network, optimizer=optimizer, start=start
                )
                for start in STARTS
            ),
        ]
        for network, optimizer in product(CASES, OPTIMIZERS)
    ]
    return [
        f"Written by `{result['command']}`: test accuracy (%) at the end, mean of {len(SEEDS)}",
        f"seeds. The digits take {EPOCHS['digits']} epochs, the tables {EPOCHS['wine']} and",
        f"{EPOCHS['columns']}.",
        "",
        *table(["network", "optimiser", *STARTS], lines),
        "",
        *(f"- {fact}" for fact in provenance([result])),
    ]


if __name__ == "__main__":
    main()
