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
    "VGG16, 40 epochs, 5 % kept": ("cifar10_vgg16_40", "dense", "budget_0.05", "narrow_0.05"),
    "ResNet, 30 epochs, 5 % kept": (
        "cifar10_rescnn_30",
        "dense",
        "budget_0.05_lr_0.024",
        "narrow_0.05_lr_0.024",
    ),
    "ResNet, 30 epochs, 10 % kept": (
        "cifar10_rescnn_30",
        "dense",
        "budget_0.1_lr_0.024",
        "narrow_0.1_lr_0.024",
    ),
}
"""Long trainings: experiment, and the rows of `LONG_HEAD`."""
LONG_HEAD = (
    "test accuracy (%), millions of multiply-adds",
    "dense",
    "TDLRT",
    "narrow dense network",
)


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
    return (
        f"{table}\n\nThe dense networks reach {dense}. Long trainings on CIFAR-10 (one seed), also "
        "of dense networks that\nhave as many parameters as TDLRT because every layer has fewer "
        f"channels:\n\n{_long_trainings(results)}"
    )


def _long_trainings(results: Mapping[str, Sequence[Result]]) -> str:
    def cell(experiment: str, row: str) -> str:
        (one,) = (one for one in results[experiment] if one["row"] == row)
        return f"{one['accuracy']:.2f}, {one['macs'] / 1e6:.0f}"

    rows = [
        [network, *(cell(experiment, row) for row in columns)]
        for network, (experiment, *columns) in LONG.items()
    ]
    return markdown(LONG_HEAD, rows)
