"""The experiments whose results are recorded, in the order of docs/results.md.

`experiments/recorded/NAME.yaml` describes one, `benchmarks/results/NAME.jsonl` holds its results.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tdlrt_lab.reports.collect import Run
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.sweep.recorded import read_results

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"

Result = dict[str, Any]

EXPERIMENTS = {
    name: ROOT / f"experiments/recorded/{name}.yaml"
    for name in (
        "mnist_lenet5",
        "mnist_budget",
        "mnist_tuning",
        "mnist_methods",
        "mnist_modes",
        "mnist_reshape",
        "mnist_default",
        "mnist_initial_rank",
        "mnist_robustness",
        "mnist_adapt_every",
        "cifar10_adapt_every",
        "cifar10_rescnn_tuning",
        "cifar10_rescnn",
        "cifar10_rescnn_long",
        "cifar10_rescnn_30_tuning",
        "cifar10_rescnn_30",
        "cifar10_vgg16_tuning",
        "cifar10_vgg16",
        "cifar10_vgg16_40_tuning",
        "cifar10_vgg16_40",
        "stdlib_gpt_tuning",
        "stdlib_gpt",
        "stdlib_gpt_8",
    )
}

IN_PICTURE = ("mnist_budget", "cifar10_rescnn")

BEFORE = {
    "train_images": None,
    "budget": None,
    "budget_start": 0.5,
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
    "reshape": None,
    "basis_every": 1,
    "precision": "float32",
}
"""Options that are newer than some results, and what runs did before there was a choice."""


def stored_options(result: Result) -> dict[str, Any]:
    """All options of the run that a result is of."""
    return {**BEFORE, **result["config"]}


def recorded(name: str) -> list[Result]:
    """The results of an experiment."""
    return read_results(RESULTS / f"{name}.jsonl")


def as_runs(results: Iterable[Result]) -> list[Run]:
    """Results as the lab's reports take them; the run directories are not needed."""
    return [
        Run(
            path=f"{result['row']}/seed{result['seed']}",
            directory=RunDirectory(result["row"]),
            config=stored_options(result),
            summary=result,
            history=[],
        )
        for result in results
    ]
