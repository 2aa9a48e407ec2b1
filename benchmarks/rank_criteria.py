"""Which directions a budget should keep: measures of their worth compared, LeNet-5 on MNIST.

    python benchmarks/rank_criteria.py --data-dir DATA_DIR

With F the mean square of the gradient of a layer's core (`ParameterBudget`):

- library: sigma^2 sqrt(F) / ||C||, as in `ParameterBudget`; its runs are those of `mnist_budget`.
- relative: sigma^2 / ||C||^2.
- fisher: sigma^2 F.
- absolute: sigma^2.
- sensitivity: |sigma dL/dsigma| = |u^T Mat_i(D) Mat_i(C)^T u| for a left singular vector u of
  Mat_i(C), with the direction D of the optimiser, its average of gradients, in place of a gradient.

Only the measure differs from the row budget_0.028 of `mnist_budget`. Adds one run
after the other to benchmarks/results/rank_criteria.json, skips what is there, and writes the table
in docs/algorithm.md.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from comparisons import EXPERIMENTS, RESULTS, recorded
from tdlrt.linalg import unfold
from tdlrt.ranks import Candidate, ParameterBudget
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import ImageData, load_data
from tdlrt_lab.documents import fill_section
from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.files import write_text
from tdlrt_lab.run.training import Training
from tdlrt_lab.sweep.plan import read_sweep

RESULT = RESULTS / "rank_criteria.json"
DOCUMENT = Path(__file__).parent.parent / "docs/algorithm.md"
ROWS = ("budget_0.028",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with mnist/train.parquet; default: the hub")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    data = load_data("mnist", arguments.data_dir)
    runs = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else []
    sweep = read_sweep(EXPERIMENTS["mnist_budget"], {"seeds": arguments.seeds})
    configs = {(run.row, run.config.seed): run.config for run in sweep.runs(".")}
    done = [(run["row"], run["seed"], run["criterion"]) for run in runs]
    for seed in arguments.seeds:
        for row in ROWS:
            for criterion in CRITERIA:
                if (row, seed, criterion) not in done:
                    config = configs[row, seed]
                    runs.append(
                        {"row": row, "criterion": criterion} | measure(config, data, criterion)
                    )
                    print(runs[-1], flush=True)
                    store(runs)
    write_table(runs)


def measure(config: RunConfig, data: ImageData, criterion: str) -> dict[str, Any]:
    """Train with another measure of worth."""
    torch.manual_seed(config.seed)
    training = Training(config, data)
    use(CRITERIA[criterion], training)
    *_, last = training.epochs(lambda: False, lambda training: None)
    return {
        "seed": config.seed,
        "accuracy": last.test_accuracy,
        "compression": last.compression,
        "ranks": last.ranks,
    }


def use(make: Callable[[Training, dict[str, Any]], ParameterBudget], training: Training) -> None:
    """Go on with another policy that has the options of the present one."""
    optimizer: Any = training.optimizer
    policy = optimizer.rank_policy
    options = {field.name: getattr(policy, field.name) for field in fields(policy)}
    optimizer.rank_policy = make(training, options)


def relative(training: Training, options: dict[str, Any]) -> ParameterBudget:
    """A budget that takes all layers for equally sensitive."""

    class Relative(ParameterBudget):
        def sensitivities(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
            return dict.fromkeys(candidates, 1.0)

    return Relative(**options)


def fisher(training: Training, options: dict[str, Any]) -> ParameterBudget:
    """A budget that keeps what an empirical Fisher matrix F I says."""

    class Fisher(ParameterBudget):
        def sensitivities(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
            known = super().sensitivities(candidates)
            return {name: value**2 for name, value in known.items()}

    return Fisher(**options)


def absolute(training: Training, options: dict[str, Any]) -> ParameterBudget:
    """A budget that compares singular values across layers as they are."""

    class Absolute(ParameterBudget):
        def sensitivities(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
            return {name: c.squared_norm for name, c in candidates.items()}

    return Absolute(**options)


def sensitivity(training: Training, options: dict[str, Any]) -> ParameterBudget:
    """A budget that keeps what the loss depends on to first order."""
    layers = dict(training.model.named_modules())
    cores = seen_cores(training)

    class Sensitivity(ParameterBudget):
        def sensitivities(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
            return dict.fromkeys(candidates, 1.0)

        def worth(self, name: str, candidate: Candidate, mode: int) -> Sequence[float]:
            core, before = cores[name], layers[name].core.detach()
            padding = [k for n, r in zip(core.shape, before.shape, strict=True) for k in (n - r, 0)]
            step = F.pad(before, padding[::-1]) - core  # lr D
            if not step.any():  # between steps, when the ranks are frozen
                return super().worth(name, candidate, mode)
            rows, moves = unfold(core, mode).double(), unfold(step, mode).double()
            vectors = torch.linalg.eigh(rows @ rows.mT)[1].flip(1)
            worths = (vectors * (moves @ rows.mT @ vectors)).sum(dim=0).abs()
            return worths.tolist()

    return Sensitivity(**options)


def seen_cores(training: Training) -> dict[str, Tensor]:
    """Cores in the bases from which directions may be kept, which a policy itself does not see."""
    adaptation = training.optimizer._engine.adaptation
    examine, cores = adaptation.examine, {}

    def seen(steps: Sequence[Any], *rest: Any) -> Any:
        for members, step in steps:
            layers = zip(members.slots, step.core, step.ranks.tolist(), strict=True)
            for slot, core, ranks in layers:
                cores[slot.name] = core[tuple(slice(rank) for rank in ranks)]
        return examine(steps, *rest)

    adaptation.examine = seen
    return cores


CRITERIA = {
    "relative": relative,
    "fisher": fisher,
    "absolute": absolute,
    "sensitivity": sensitivity,
}


def store(runs: list[dict[str, Any]]) -> None:
    """Write the result file."""
    result = {
        **made_by("python benchmarks/rank_criteria.py --data-dir DATA_DIR"),
        "runs": runs,
    }
    write_text(RESULT, json.dumps(result, indent=2) + "\n")


def write_table(runs: list[dict[str, Any]]) -> None:
    """Put the comparison in the document."""
    seeds = sorted({run["seed"] for run in runs})
    lines = [f"| worth | {' | '.join(f'accuracy, {row}' for row in ROWS)} |"]
    lines.append(f"|{' --- |' * (1 + len(ROWS))}")
    for criterion in ("library", *CRITERIA):
        cells = []
        for row in ROWS:
            if criterion == "library":
                library = recorded("mnist_budget")
                found = [r for r in library if r["row"] == row and r["seed"] in seeds]
            else:
                found = [r for r in runs if (r["row"], r["criterion"]) == (row, criterion)]
            values = [run["accuracy"] for run in found]
            cells.append(
                f"{statistics.fmean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})"
            )
        lines.append(f"| {criterion} | {' | '.join(cells)} |")
    fill_section(DOCUMENT, "criteria", lines)


if __name__ == "__main__":
    main()
