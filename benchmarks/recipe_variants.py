"""What else could help at a twentieth of the size: ResNet of four blocks on held-out CIFAR-10.

    python benchmarks/recipe_variants.py --data-dir DATA_DIR

Changes that no option of the command line makes, each to the row lr_0.024 of
`cifar10_rescnn_30_tuning`:

- library: no change.
- relative, fisher, absolute, sensitivity: measures of worth, see `rank_criteria.py`.
- ends: directions of the first and of the last layers are worth four times as much.
- bases x 0.3, bases x 3: the parts of a step that turn the bases are shorter or longer.
- averaged: the mean of the dense weights after each step of the last quarter of the training,
  decomposed at the ranks that the network has; statistics of batch norm are measured anew.

Adds one run after the other to benchmarks/results/recipe_variants.json, skips what is there, and
writes the table in docs/algorithm.md.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, update_bn

import tdlrt
from comparisons import EXPERIMENTS, RESULTS
from operations import table
from rank_criteria import CRITERIA, use
from resumable import combinations, measured
from tdlrt.optim.rules.adam import AdamWRule
from tdlrt.ranks import Candidate, ParameterBudget
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import load_data
from tdlrt_lab.documents import fill_section
from tdlrt_lab.run.accuracy import accuracy
from tdlrt_lab.run.training import Training
from tdlrt_lab.sweep.plan import read_sweep

RESULT = RESULTS / "recipe_variants.json"
DOCUMENT = Path(__file__).parent.parent / "docs/algorithm.md"
EXPERIMENT, ROW = "cifar10_rescnn_30_tuning", "lr_0.024"
ENDS = ("stem", "block4.conv2", "block4.shortcut")
AVERAGED = 0.75
"""Share of the training after which weights are averaged."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with cifar10/train.parquet; default: the hub")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    (run,) = (r for r in read_sweep(EXPERIMENTS[EXPERIMENT], {}).runs(".") if r.row == ROW)
    result = measured(
        RESULT,
        "python benchmarks/recipe_variants.py --data-dir DATA_DIR",
        combinations(seed=arguments.seeds, variant=arguments.only),
        partial(measure, run.config, arguments.data_dir),
    )
    fill_section(DOCUMENT, "recipe_variants", section(result["rows"]))


def measure(config: RunConfig, data_dir: str | None, seed: int, variant: str) -> dict[str, Any]:
    """Train with one change; all seeds hold out the same images."""
    data = load_data(config.data, data_dir, train_images=config.train_images)
    data = data.hold_out(config.validation or 0, config.seed)
    config = replace(config, seed=seed)
    torch.manual_seed(seed)
    training = Training(config, data)
    average = Average(training) if variant == "averaged" else None
    with VARIANTS[variant](training):
        *_, last = training.epochs(
            lambda: False, average.update if average else lambda training: None
        )
    found = {"accuracy": last.validation_accuracy, "compression": last.compression}
    if average:
        found = {**found, "last": found["accuracy"], **average.accuracies()}
    return {**found, "ranks": last.ranks}


class Average:
    """The running mean of a network's dense weights."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.mean = AveragedModel(tdlrt.to_dense(training.model))

    def update(self, training: Training) -> None:
        """Take the weights after a step."""
        if training.step > AVERAGED * training.steps:
            self.mean.update_parameters(tdlrt.to_dense(training.model))

    def accuracies(self) -> dict[str, float]:
        """That of the mean, and that of the mean at the ranks of the network."""
        dense = self.measured()
        tdlrt.factorize_(self.mean.module, rank=dict(self.training.ranks))
        return {"mean": dense, "accuracy": self.measured()}

    def measured(self) -> float:
        """Held-out accuracy."""
        batches, network = self.training.batches, self.mean.module
        order, moves = batches.order(0), batches.moves(0)
        steps = torch.split(order, self.training.config.batch_size)
        update_bn((batches.batch(index, moves) for index in steps), network)
        network.eval()
        inputs, labels = self.training._held_out
        return accuracy(lambda images: network(batches.normalise(images)), inputs, labels)


@contextmanager
def policy(
    make: Callable[[Training, dict[str, Any]], ParameterBudget], training: Training
) -> Iterator[None]:
    """Train with another policy of the same budget."""
    use(make, training)
    yield


def ends(training: Training, options: dict[str, Any]) -> ParameterBudget:
    """A budget that takes a relative error of the outer layers for four times as bad."""

    class Ends(ParameterBudget):
        def sensitivities(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
            known = super().sensitivities(candidates)
            return {name: (4 if name in ENDS else 1) * value for name, value in known.items()}

    return Ends(**options)


def bases(factor: float, training: Training) -> AbstractContextManager[Any]:
    """Multiply what turns the bases."""
    advance = AdamWRule.advance

    def scaled(
        self: AdamWRule,
        gradients: list[Tensor],
        weight: Tensor,
        moments: Mapping[str, list[Tensor]],
        steps: Sequence[Tensor],
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        (core, *parts), state = advance(self, gradients, weight, moments, steps)
        return [core, *(factor * part for part in parts)], state

    return patch.object(AdamWRule, "advance", scaled)


VARIANTS: dict[str, Callable[[Training], AbstractContextManager[Any]]] = {
    "library": nullcontext,
    **{name: partial(policy, make) for name, make in CRITERIA.items()},
    "ends": partial(policy, ends),
    "bases x 0.3": partial(bases, 0.3),
    "bases x 3": partial(bases, 3.0),
    "averaged": nullcontext,
}


def section(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the table."""
    rows = sorted(rows, key=itemgetter("seed"))
    cells = []
    for variant in VARIANTS:
        if own := [row for row in rows if row["variant"] == variant]:
            accuracies = ", ".join(f"{row['accuracy']:.2f}" for row in own)
            compression = ", ".join(f"{100 * row['compression']:.1f}" for row in own)
            cells.append([variant, accuracies, compression])
    if means := [f"{row['mean']:.2f}" for row in rows if "mean" in row]:
        cells.append(["averaged, at the ranks of the mean", ", ".join(means), ""])
    return table(("change", "held-out accuracy (%)", "compression (%)"), cells)


if __name__ == "__main__":
    main()
