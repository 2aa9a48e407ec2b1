"""LeNet-5 on MNIST: the dense network and TDLRT at several tolerances, over several seeds.

    python benchmarks/mnist_lenet5.py --data-dir DATA_DIR --tau 0.05 0.1 0.2

Writes one small JSON file per run to benchmarks/results/mnist_lenet5; `results_table.py` turns
them into docs/results.md. Run directories are kept in --runs: finished runs are skipped and
interrupted ones continue when the script is started again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tdlrt.errors import TdlrtError
from tdlrt.experiments.config import RunConfig
from tdlrt.experiments.results import EpochMetrics
from tdlrt.experiments.runner import Observer, run
from tdlrt.experiments.training import Training

RESULTS = Path(__file__).parent / "results" / "mnist_lenet5"


class Lines(Observer):
    """A line per epoch."""

    def epoch_ended(self, training: Training, metrics: EpochMetrics) -> None:
        """Print accuracy and compression."""
        print(
            f"  epoch {metrics.epoch}  accuracy {metrics.test_accuracy:.2f} %  "
            f"compression {100 * metrics.compression:.1f} %  {metrics.seconds:.1f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with mnist/train.parquet; default: the hub")
    parser.add_argument("--tau", type=float, nargs="+", required=True, help="tolerances")
    parser.add_argument("--integrator", choices=["parallel", "bug"], default="parallel")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/mnist_lenet5"))
    arguments = parser.parse_args()
    methods: list[dict[str, Any]] = [{"method": "dense"}]
    methods += [
        {"method": "tdlrt", "tau": tau, "integrator": arguments.integrator} for tau in arguments.tau
    ]
    try:
        for seed in arguments.seeds:
            for method in methods:
                config = RunConfig(
                    model="lenet5", data="mnist", data_dir=arguments.data_dir, seed=seed, **method
                )
                measure(config, arguments.runs)
    except TdlrtError as error:
        sys.exit(f"error: {error}")


def measure(config: RunConfig, runs: Path) -> None:
    """Do one run and store its result, unless that was done before."""
    tucker = config.method == "tdlrt"
    kind = f"{config.integrator}_tau{config.tau:g}" if tucker else config.method
    name = f"{kind}_seed{config.seed}"
    result = RESULTS / f"{name}.json"
    if result.exists():
        print(f"{name}: done before")
        return
    print(name, flush=True)
    words = f"--tau {config.tau:g}" if tucker else "--method dense"
    words += " --integrator bug" if config.integrator == "bug" else ""
    command = f"tdlrt train lenet5 --data mnist --data-dir DATA_DIR {words} --seed {config.seed}"
    started = (runs / name / "config.yaml").exists()
    summary = run(config, runs / name, resume=started, observer=Lines(), command=command)
    summary["config"]["data_dir"] = "DATA_DIR"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
