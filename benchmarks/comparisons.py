"""The experiments that `accuracy.py` runs and `results_table.py` prints."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdlrt.experiments.config import RunConfig

RESULTS = Path(__file__).parent / "results"

Options = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Runs that belong in one table.

    Attributes:
        note: What a reader must know beside the numbers: what was tuned, and on which seeds.
        options: Options of `RunConfig` that all rows share.
        rows: Options of each row, by name; the name begins the file names of its results.
        seeds: Seeds of each row, unless told otherwise.
    """

    note: str
    options: Options
    rows: Mapping[str, Options]
    seeds: tuple[int, ...] = (0, 1, 2)

    def config(self, row: str, seed: int, data_dir: str | None = None) -> RunConfig:
        """Options of one run."""
        return RunConfig(**{**self.options, **self.rows[row]}, seed=seed, data_dir=data_dir)


EXPERIMENTS = {
    "mnist_lenet5": Experiment(
        note=(
            "The tolerances were chosen after a look at the test accuracy of seed 0, so their "
            "rows say what is reachable, not what a blind choice would give. Budgets, and the "
            "ranks of tucker, were set beforehand."
        ),
        options={"model": "lenet5", "data": "mnist"},
        rows={
            "dense": {"method": "dense"},
            "budget_0.05": {"budget": 0.05},
            "budget_0.03": {"budget": 0.03},
            "tucker_95": {
                "method": "tucker",
                "rank": {"conv1": [10, 1, 5, 5], "conv2": [25, 10, 5, 5], "fc1": [10, 10]},
            },
            "tucker_97": {
                "method": "tucker",
                "rank": {"conv1": [10, 1, 5, 5], "conv2": [16, 8, 5, 5], "fc1": [6, 6]},
            },
        },
    ),
    "cifar10_rescnn": Experiment(
        note="Nothing was tuned; the budgets and the ranks of tucker were set beforehand.",
        options={
            "model": "rescnn",
            "data": "cifar10",
            "train_images": 10_000,
            "epochs": 10,
            "weight_decay": 5e-4,
        },
        rows={
            "dense": {"method": "dense"},
            "budget_0.1": {"budget": 0.1},
            "budget_0.05": {"budget": 0.05},
            "tucker_0.2": {"method": "tucker", "rank": 0.2},
            "tucker_0.12": {"method": "tucker", "rank": 0.12},
        },
    ),
}

# Options that are newer than some result files, and what runs did before there was a choice.
BEFORE = {
    "train_images": None,
    "budget": None,
    "ramp": "constant",
    "spare": 0.0,
    "optimizer": "sgd",
    "warmup": 0.0,
}


def stored_options(result: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the run that a result file is about."""
    return {**BEFORE, **result["config"]}
