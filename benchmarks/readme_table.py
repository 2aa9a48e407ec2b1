"""The table of the README: methods at equal size, from the result files in benchmarks/results."""

from collections.abc import Mapping, Sequence
from statistics import mean

from comparisons import Result
from findings import markdown
from tdlrt_lab.spread import format_spread

__all__ = ["readme_table"]

COLUMNS = ("MNIST, 5 % kept", "MNIST, 2 %", "MNIST, 1 %", "CIFAR-10, 5 %")

CELLS: dict[str, Sequence[tuple[str, str] | None]] = {
    "TDLRT": (
        ("mnist_methods", "tdlrt_budget=0.05"),
        ("mnist_methods", "tdlrt_budget=0.02"),
        ("mnist_methods", "tdlrt_budget=0.01"),
        ("cifar10_rescnn", "budget_0.05"),
    ),
    "TDLRT, first linear layer [as a tensor](docs/how-to/from-scratch.md#1-choose-layers)": (
        None,
        ("mnist_reshape", "split_budget=0.02"),
        ("mnist_reshape", "split_budget=0.01"),
        None,
    ),
    "low-rank matrices": (
        ("mnist_methods", "matrix_budget=0.05"),
        ("mnist_methods", "matrix_budget=0.02"),
        ("mnist_methods", "matrix_budget=0.01"),
        ("cifar10_rescnn", "matrix_0.05"),
    ),
    "Tucker factors, trained as they are": (
        ("mnist_methods", "tucker_budget=0.05"),
        ("mnist_methods", "tucker_budget=0.02"),
        ("mnist_methods", "tucker_budget=0.01"),
        ("cifar10_rescnn", "tucker_0.05"),
    ),
    "pruning of single weights by magnitude": (
        ("mnist_methods", "magnitude_budget=0.05"),
        ("mnist_methods", "magnitude_budget=0.02"),
        ("mnist_methods", "magnitude_budget=0.01"),
        None,
    ),
}
"""Experiment and row of the number in each column."""

DENSE = {"MNIST": ("mnist_methods", "dense"), "CIFAR-10": ("cifar10_rescnn", "dense_adam")}

LONG = {
    "VGG16 (40 epochs)": ("cifar10_vgg16_40", "dense", "budget_0.05"),
    "the ResNet (30 epochs)": ("cifar10_rescnn_30", "dense", "budget_0.05_lr_0.024"),
    "with 10 % kept": ("cifar10_rescnn_30", "dense", "budget_0.1_lr_0.024"),
}
"""Long trainings: experiment, and the rows of the dense network and of TDLRT."""


def readme_table(results: Mapping[str, Sequence[Result]]) -> str:
    """Accuracies of five ways to a small network, those of the dense networks, and long trainings.

    Args:
        results: The results of each experiment.
    """

    def accuracies(experiment: str, row: str) -> list[float]:
        return [one["accuracy"] for one in results[experiment] if one["row"] == row]

    rows = [
        [name, *(format_spread(accuracies(*cell), 2) if cell else "-" for cell in cells)]
        for name, cells in CELLS.items()
    ]
    dense = " and ".join(
        f"{mean(accuracies(*cell)):.2f} % on {data}" for data, cell in DENSE.items()
    )
    table = markdown(["test accuracy (%), share of the weights kept", *COLUMNS], rows)
    long = ", ".join(
        f"{network} {mean(accuracies(experiment, tdlrt)):.2f} % "
        f"(dense {mean(accuracies(experiment, reference)):.2f} %)"
        for network, (experiment, reference, tdlrt) in LONG.items()
    )
    return (
        f"{table}\n\nThe dense networks reach {dense}. After a long training on CIFAR-10 with 5 % "
        f"kept (one seed), TDLRT has:\n{long}."
    )
