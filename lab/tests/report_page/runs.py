"""Run directories as runs would have left them, without training."""

import json
import re

import torch
from safetensors.torch import save_file

from tdlrt_lab.config import RunConfig
from tdlrt_lab.run.environment import versions
from tdlrt_lab.run.metrics import EpochMetrics
from tdlrt_lab.run.results import RunDirectory


def write_directory(
    root, path, *, accuracy=90.0, bits=None, compression=0.0, numbers=None, **options
):
    config = RunConfig(**{"model": "lenet5", "data": "digits", "epochs": 3, **options})
    directory = RunDirectory(root / path)
    directory.path.mkdir(parents=True)
    directory.write_config(config)
    small = compression > 0
    directory.write_metrics([_epoch(n, accuracy, bits, compression) for n in (1, 2, 3)])
    summary = {
        "command": f"tdlrt train lenet5 --seed {config.seed}",
        "model": config.model,
        "data": config.data,
        "method": config.method,
        "tau": config.tau if small and config.method == "tdlrt" else None,
        "budget": config.budget,
        "seed": config.seed,
        "accuracy": accuracy,
        "bits_per_character": bits,
        "compression": compression,
        "network_compression": compression / 2,
        "parameters": 100,
        "network_parameters": round(1000 * (1 - compression)),
        "network_dense_parameters": 1000,
        "layers": [],
        "macs": 5000,
        "dense_macs": 9000,
        "seconds": 2.5,
        "versions": {"tdlrt": versions()["tdlrt"], "torch": "2.6.0"},
        "machine": {"threads": 1},
        **(numbers or {}),
    }
    directory.summary.write_text(json.dumps(summary))
    directory.model.parent.mkdir()
    weights = {"head.weight": torch.ones(2, 2)}
    if small:
        weights["conv2.core"] = torch.arange(1.0, 25.0).sin().view(3, 2, 2, 2)
    save_file(weights, directory.model)
    return directory


def _epoch(number, accuracy, bits, compression):
    ranks = {"conv2": [9 - 2 * number, 4, 3, 3], "fc1": [5, 5]} if compression else {}
    return EpochMetrics(
        epoch=number,
        loss=1 / number,
        train_accuracy=50.0,
        test_accuracy=accuracy - 10 / number,
        compression=compression,
        network_compression=compression / 2,
        parameters=100,
        ranks=ranks,
        lr=0.1,
        seconds=0.8,
        bits_per_character=None if bits is None else bits + 1 / number,
    )


def write_sweep(root):
    """Dense, two sizes of TDLRT and one of free factors, two seeds each."""
    for seed in (0, 1):
        options = {"method": "dense", "accuracy": 95.0 + seed}
        write_directory(root, f"dense/seed{seed}", seed=seed, **options)
        for tau, accuracy in ((0.1, 94.0), (0.2, 93.0)):
            options = {"tau": tau, "accuracy": accuracy - seed, "compression": 0.5 + tau}
            write_directory(root, f"tdlrt_tau={tau}/seed{seed}", seed=seed, **options)
        options = {"method": "tucker", "rank": 0.3, "accuracy": 91.0, "compression": 0.6}
        write_directory(root, f"tucker/seed{seed}", seed=seed, **options)
    return root


def write_full_sweep(root):
    """The same with a description, a failure with markup in it, and ranks that vary."""
    write_sweep(root)
    (root / "sweep.json").write_text('{"title": "All <methods>", "note": "Small & quick"}')
    (root / "bad").mkdir()
    (root / "bad" / "seed0.error.json").write_text('{"error": "<script>alert(1)</script>"}')
    options = {"method": "tucker", "rank": 0.1, "accuracy": 80.0, "compression": 0.9}
    write_directory(root, "tucker-2", **options)
    return root


def spread_names(directory, name):
    """Put a name into every text of a run: its options, its result and its metrics."""
    config, summary = directory.read_config(), directory.read_summary()
    names = {key: f"x{name}" for key in ("model", "data", "method")}
    config |= names | {"modes": name, name: name, "rank": {name: 0.5}}
    summary |= names | {"command": name, "versions": {"tdlrt": name, name: name}}
    summary |= {"machine": {name: name}}
    directory.config.write_text(json.dumps(config))
    directory.summary.write_text(json.dumps(summary))
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    for line in lines:
        line["ranks"] = {name + layer: ranks for layer, ranks in line["ranks"].items()}
    directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_named_sweep(root, name):
    """A sweep in which every text is the same name."""
    for tau in (0.1, 0.2):
        run = write_directory(root, f"tau{tau}", tau=tau, compression=0.5)
        spread_names(run, name)
    spread_names(write_directory(root, "dense", method="dense"), name)
    (root / "bad.error.json").write_text(json.dumps({"error": name}))
    folder = root / re.sub("[/\0]", "", name)
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    (root / "sweep.json").write_text(json.dumps({"title": name, "note": name}))
