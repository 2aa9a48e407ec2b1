import importlib.util
from pathlib import Path

from tdlrt.experiments.config import RunConfig

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "results_table.py"


def load():
    spec = importlib.util.spec_from_file_location("results_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(method, seed, accuracy, **options):
    config = RunConfig(model="lenet5", data="mnist", method=method, seed=seed, **options)
    return {
        "command": f"tdlrt train lenet5 --data mnist --seed {seed}",
        "model": "lenet5",
        "data": "mnist",
        "method": method,
        "tau": config.tau if method == "tdlrt" else None,
        "seed": seed,
        "epochs": config.epochs,
        "accuracy": accuracy,
        "compression": 0.5,
        "network_compression": 0.25,
        "network_parameters": 1000,
        "macs": 2000,
        "seconds": 30.0,
        "versions": {"torch": "2.13.0"},
        "machine": {"threads": 2},
        "config": config.to_dict(),
    }


def test_rows_hold_mean_and_deviation_over_the_seeds():
    results = [result("tdlrt", seed, accuracy) for seed, accuracy in enumerate((98.0, 99.0, 97.0))]
    results += [result("tdlrt", 0, 96.0, rank=0.25), result("dense", 0, 99.5)]
    lines = load().section("mnist_lenet5", results).splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    assert rows == [
        "| dense | 0 | 99.50 | 50.0 | 25.0 | 1,000 | 2,000 |",
        "| tdlrt, tau 0.1 | 0, 1, 2 | 98.00 ± 1.00 | 50.0 | 25.0 | 1,000 | 2,000 |",
        "| tdlrt, tau 0.1, rank 0.25 | 0 | 96.00 | 50.0 | 25.0 | 1,000 | 2,000 |",
    ]
    assert "- versions: torch 2.13.0" in lines
    assert lines.count("tdlrt train lenet5 --data mnist --seed 0") == 3
