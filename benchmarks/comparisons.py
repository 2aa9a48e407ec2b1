"""The experiments that `accuracy.py` runs and `results_table.py` prints."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdlrt_lab.config import RunConfig

RESULTS = Path(__file__).parent / "results"

Options = Mapping[str, Any]
Result = dict[str, Any]

# Options that do not tell one row of a table from another.
PLACE = ("seed", "data_dir", "device")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Runs that belong in one table.

    Attributes:
        subject: What they are about, for the heading.
        note: What a reader must know beside the numbers: what was tuned, and on which seeds.
        options: Options of `RunConfig` that all rows share.
        rows: Options of each row, by name; the name begins the file names of its results.
        seeds: Seeds of each row, unless told otherwise.
        in_readme: Whether the README shows it.
    """

    subject: str
    note: str
    options: Options
    rows: Mapping[str, Options]
    seeds: tuple[int, ...] = (0, 1, 2)
    in_readme: bool = False

    def config(self, row: str, seed: int, data_dir: str | None = None) -> RunConfig:
        """Options of one run."""
        return RunConfig(**{**self.options, **self.rows[row]}, seed=seed, data_dir=data_dir)


# All but dense and TDLRT itself, which other experiments have tuned with the same budgets.
OTHERS = (
    *("tucker", "cp", "tensor_train", "matrix", "matrix_dlrt", "posthoc"),
    *("magnitude", "snip", "grasp", "structured"),
)
RATES = (0.001, 0.003, 0.01, 0.03)
SIZES = (0.5, 0.05, 0.02, 0.01)


def best_rate(method: str) -> Options:
    """The learning rate with the best accuracy of mnist_tuning; none before that has run."""
    found: dict[float, list[float]] = {}
    for path in (RESULTS / "mnist_tuning").glob(f"{method}_lr*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(result["config"]["lr"], []).append(result["accuracy"])
    return {"lr": max(found, key=lambda rate: statistics.mean(found[rate]))} if found else {}


def each_rate(methods: Sequence[str], rates: Sequence[float]) -> Mapping[str, Options]:
    """A row per method and learning rate."""
    return {
        f"{method}_lr{rate:g}": {"method": method, "lr": rate}
        for method in methods
        for rate in rates
    }


def each_period(periods: Sequence[int]) -> Mapping[str, Options]:
    """A row of a tolerance and one of a budget for each number of steps between examinations."""
    sizes: Mapping[str, Options] = {"tau_0.1": {"tau": 0.1}, "budget_0.05": {"budget": 0.05}}
    return {
        f"{name}_every{period}": {**size, "adapt_every": period}
        for period in periods
        for name, size in sizes.items()
    }


EXPERIMENTS = {
    "mnist_lenet5": Experiment(
        subject="tolerances",
        note=(
            "Stochastic gradient descent with momentum. The tolerances were chosen after a look at "
            "the test accuracy of seed 0, so their rows say what is reachable, not what a blind "
            "choice would give."
        ),
        options={"model": "lenet5", "data": "mnist"},
        rows={
            "dense": {"method": "dense"},
            "parallel_tau0.04": {"tau": 0.04},
            "parallel_tau0.1": {"tau": 0.1},
            "bug_tau0.1": {"tau": 0.1, "integrator": "bug"},
            "parallel_tau0.12": {"tau": 0.12},
        },
    ),
    "mnist_budget": Experiment(
        subject="budgets",
        note=(
            "Ranks that TDLRT finds within a budget against ranks chosen by hand for direct "
            "training of the factors. The recipes (optimiser, learning rate, warm-up, start, and "
            "for tucker the ranks) were chosen by the test accuracy of seed 0, in about 20 runs "
            "for tucker and 40 for TDLRT, from which its defaults come; what a direction is worth "
            "to a budget was chosen on held-out training images, in 15 runs. The rows are of other "
            "seeds. Dense has torch's default for Adam."
        ),
        options={"model": "lenet5", "data": "mnist"},
        rows={
            "dense_adam": {"method": "dense", "optimizer": "adam"},
            "budget_0.05": {"budget": 0.05},
            "budget_0.045": {"budget": 0.045},
            "budget_0.035": {"budget": 0.035},
            "budget_0.028": {"budget": 0.028},
            "tucker_95": {
                "method": "tucker",
                "rank": {"conv1": [10, 1, 5, 5], "conv2": [25, 10, 5, 5], "fc1": [10, 10]},
                "optimizer": "adam",
                "lr": 0.006,
            },
            "tucker_97": {
                "method": "tucker",
                "rank": {"conv1": [10, 1, 5, 5], "conv2": [10, 6, 5, 5], "fc1": [7, 7]},
                "lr": 0.05,
                "warmup": 0.04,
            },
            "tucker_97_adam": {
                "method": "tucker",
                "rank": {"conv1": [10, 1, 5, 5], "conv2": [10, 6, 5, 5], "fc1": [7, 7]},
                "optimizer": "adam",
                "lr": 0.006,
            },
        },
        seeds=(1, 2, 3, 4, 5),
        in_readme=True,
    ),
    "mnist_tuning": Experiment(
        subject="learning rates",
        note=(
            "Learning rates of the methods in the next table: accuracy on 10,000 held-out training "
            "images, one seed."
        ),
        options={
            **{"model": "lenet5", "data": "mnist", "optimizer": "adam", "epochs": 3},
            **{"budget": 0.05, "validation": 10_000},
        },
        rows=each_rate(OTHERS, RATES),
        seeds=(0,),
    ),
    "mnist_methods": Experiment(
        subject="all methods at equal sizes",
        note=(
            "All methods at equal numbers of parameters, each with the best of four learning "
            "rates of mnist_tuning, chosen at a twentieth of the weights; at half of them that of "
            "grasp, 0.01, is too high, and its networks stay at chance. TDLRT and dense are as in "
            "mnist_budget, where TDLRT had more looks. Pruning by masks (magnitude, snip, grasp) "
            "counts the weights that stay and not their places, and its networks do all the "
            "multiply-adds."
        ),
        options={"model": "lenet5", "data": "mnist", "optimizer": "adam"},
        rows={
            "dense": {"method": "dense"},
            **{f"tdlrt_{size:g}": {"budget": size} for size in SIZES},
            **{
                f"{method}_{size:g}": {"method": method, "budget": size, **best_rate(method)}
                for method in OTHERS
                for size in SIZES
            },
        },
        seeds=(1, 2, 3, 4, 5),
    ),
    "mnist_modes": Experiment(
        subject="bases for the channels alone",
        note=(
            "Bases for the two channel modes alone. The rows tdlrt_0.05 and tdlrt_0.02 above have "
            "bases for the modes of the kernel too, else the same recipe."
        ),
        options={"model": "lenet5", "data": "mnist", "modes": "channels"},
        rows={f"channels_{size:g}": {"budget": size} for size in (0.05, 0.02)},
        seeds=(1, 2),
    ),
    "mnist_initial_rank": Experiment(
        subject="initial ranks",
        note=(
            "The same budget from different ranks at the start, with and without warm-up. The row "
            "budget_0.028 above starts at half of each mode; it and rank 0.1 start at 0.3 of the "
            "norm, full rank at the norm unless told otherwise."
        ),
        options={"model": "lenet5", "data": "mnist", "budget": 0.028},
        seeds=(1, 2, 3),
        rows={
            "rank_0.1": {"rank": 0.1},
            "rank_full": {"rank": "full"},
            "rank_full_scaled": {"rank": "full", "init_scale": 0.3},
            "rank_0.1_warm": {"rank": 0.1, "warmup": 0.05},
            "rank_0.5_warm": {"warmup": 0.05},
            "rank_full_warm": {"rank": "full", "init_scale": 0.3, "warmup": 0.05},
        },
    ),
    "mnist_robustness": Experiment(
        subject="a penalty on the singular values",
        note=(
            "Networks for docs/robustness.md: the recipe of budget_0.05 above with a penalty on "
            "the spread of the cores' singular values."
        ),
        options={"model": "lenet5", "data": "mnist"},
        rows={
            "penalty_0.001": {"budget": 0.05, "spectral_penalty": 0.001},
            "penalty_0.01": {"budget": 0.05, "spectral_penalty": 0.01},
        },
        seeds=(1, 2, 3),
    ),
    "mnist_adapt_every": Experiment(
        subject="steps between two examinations of the ranks",
        note=(
            "A short training, to see how often ranks must be examined: those of a tolerance stay "
            "after half of the 1,407 steps, those of a budget after a fifth. Nothing was tuned. "
            "`tdlrt train` examines them in every step with a tolerance and in every tenth with a "
            "budget, `tdlrt.TDLRT` in each of the first 100 steps and every tenth after them. Runs "
            "from before steps were computed in batches."
        ),
        options={"model": "lenet5", "data": "mnist", "epochs": 3},
        rows=each_period((1, 5, 10, 20, 50)),
    ),
    "cifar10_adapt_every": Experiment(
        subject="steps between two examinations of the ranks",
        note=(
            "As above, in 375 steps of small batches: the ranks of a tolerance stay after 187 of "
            "them, those of a budget after 75. Accuracies are those of the beginning of a "
            "training, and tell the rows apart, not the methods."
        ),
        options={
            **{"model": "rescnn", "data": "cifar10", "epochs": 1, "batch_size": 32},
            **{"train_images": 12_000, "warmup": 0.05},
        },
        rows=each_period((1, 10, 20, 50)),
    ),
    "cifar10_rescnn_tuning": Experiment(
        subject="learning rates",
        note=(
            "Learning rates of the factors that are trained directly in the next table: accuracy "
            "on 10,000 held-out training images after 5 epochs of 20,000, one seed."
        ),
        options={
            **{"model": "rescnn", "data": "cifar10", "epochs": 5, "batch_size": 128},
            **{"warmup": 0.05, "budget": 0.05, "optimizer": "adam"},
            **{"train_images": 30_000, "validation": 10_000},
        },
        rows=each_rate(("tucker", "matrix"), (0.001, 0.003, 0.006)),
        seeds=(0,),
    ),
    "cifar10_rescnn": Experiment(
        subject="4 epochs",
        note=(
            "A dense run takes about 17 minutes on one core. Learning rates and warm-up were "
            "chosen on 10,000 held-out training images, after 5 epochs of 20,000: warm-up in 2 "
            "runs each for TDLRT and tucker; 3 learning rates for TDLRT and 2 for dense; those of "
            "tucker and matrix are the best of the table above. A budget counts parameters: of as "
            "many of them TDLRT makes a network with three and a half times the multiply-adds of a "
            "uniform share."
        ),
        options={
            "model": "rescnn",
            "data": "cifar10",
            "epochs": 4,
            "batch_size": 128,
            "warmup": 0.05,
        },
        rows={
            "dense_adam": {"method": "dense", "optimizer": "adam", "lr": 0.002},
            "budget_0.1": {"budget": 0.1},
            "budget_0.05": {"budget": 0.05},
            "tucker_0.2": {"method": "tucker", "rank": 0.2, "optimizer": "adam", "lr": 0.006},
            "tucker_0.05": {"method": "tucker", "budget": 0.05, "optimizer": "adam", "lr": 0.006},
            "matrix_0.05": {"method": "matrix", "budget": 0.05, "optimizer": "adam", "lr": 0.006},
        },
        seeds=(1, 2, 3),
        in_readme=True,
    ),
    "cifar10_rescnn_long": Experiment(
        subject="12 epochs",
        note=(
            "The recipes of the table above in three times as many epochs, with the standard "
            "augmentation, to see what of the distance to dense is the length of the training: "
            "next to nothing."
        ),
        options={
            **{"model": "rescnn", "data": "cifar10", "epochs": 12, "batch_size": 128},
            **{"warmup": 0.05, "augment": "standard"},
        },
        rows={
            "dense_adam": {"method": "dense", "optimizer": "adam", "lr": 0.002},
            "budget_0.05": {"budget": 0.05},
            "tucker_0.05": {"method": "tucker", "budget": 0.05, "optimizer": "adam", "lr": 0.006},
        },
        seeds=(1,),
    ),
    "cifar10_vgg16_tuning": Experiment(
        subject="learning rates",
        note=(
            "Learning rates of the low-rank methods in the next table: accuracy on 10,000 held-out "
            "training images after 6 epochs of 20,000, one seed."
        ),
        options={
            **{"model": "vgg16", "data": "cifar10", "epochs": 6, "batch_size": 256},
            **{"warmup": 0.05, "augment": "standard", "budget": 0.05, "optimizer": "adam"},
            **{"train_images": 30_000, "validation": 10_000},
        },
        rows=each_rate(("tdlrt", "tucker", "matrix"), (0.001, 0.003, 0.006)),
        seeds=(0,),
    ),
    "cifar10_vgg16": Experiment(
        subject="16 epochs",
        note=(
            "Short trainings on a GPU that several runs share, but for TDLRT's row and those with "
            "lr 0.003, which ran on one CPU core each: on a GPU TDLRT's steps take many times as "
            "long as dense ones (docs/gpu.md). The rates began as those of the table of rescnn "
            "and, for dense by SGD, as a usual one; held-out images, in the table above, then "
            "confirmed TDLRT's and preferred 0.003 for tucker and matrix."
        ),
        options={
            **{"model": "vgg16", "data": "cifar10", "epochs": 16, "batch_size": 256},
            **{"warmup": 0.05, "augment": "standard"},
        },
        rows={
            "dense_sgd": {
                **{"method": "dense", "optimizer": "sgd", "lr": 0.05, "weight_decay": 0.0005}
            },
            "dense_adam": {"method": "dense", "optimizer": "adam", "lr": 0.002},
            "budget_0.1": {"budget": 0.1},
            "budget_0.05": {"budget": 0.05},
            "tucker_0.1": {"method": "tucker", "budget": 0.1, "optimizer": "adam", "lr": 0.006},
            "tucker_0.05": {"method": "tucker", "budget": 0.05, "optimizer": "adam", "lr": 0.006},
            "tucker_0.05_lr0.003": {
                **{"method": "tucker", "budget": 0.05, "optimizer": "adam", "lr": 0.003}
            },
            "matrix_0.05": {"method": "matrix", "budget": 0.05, "optimizer": "adam", "lr": 0.006},
            "matrix_0.05_lr0.003": {
                **{"method": "matrix", "budget": 0.05, "optimizer": "adam", "lr": 0.003}
            },
        },
        seeds=(1, 2),
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
    "spectral_penalty": 0.0,
    "image_size": None,
    "validation": None,
    "augment": "none",
    "dense_until": 0.6,
    "skip_nonfinite": 0,
    "modes": "all",
}


def stored_options(result: Result) -> dict[str, Any]:
    """All options of the run that a result file is about."""
    return {**BEFORE, **result["config"]}


def repetitions(results: Sequence[Result]) -> list[list[Result]]:
    """Results of runs that differ in their seed alone, in the order of their seeds."""
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        options = {k: v for k, v in stored_options(result).items() if k not in PLACE}
        groups.setdefault(json.dumps(options, sort_keys=True), []).append(result)
    return list(groups.values())
