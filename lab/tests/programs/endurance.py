"""Thousands of steps that all adapt ranks: do orthonormality, memory and step time stay flat?

    python lab/tests/programs/endurance.py

A small network on random images, a new batch and an examination of the ranks in every step. The
tolerance goes up and down every 25 steps and the labels change every 500, so that ranks keep
moving. Writes benchmarks/results/endurance.json.
"""

import argparse
import gc
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdlrt
from tdlrt.files import write_atomically
from tdlrt.linalg import orthonormality_error
from tdlrt.nn.models import tucker_layers
from tdlrt_lab.run.environment import machine, versions

ROOT = Path(__file__).parents[3]
RESULT = ROOT / "benchmarks/results/endurance.json"
BLOCK = 500
TOLERANCES = (tdlrt.RelativeTolerance(0.05, spare=0.25), tdlrt.RelativeTolerance(0.3))
HALF_PERIOD = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for integrator in ("parallel", "bug"):
        for row in endure(integrator, arguments.steps):
            rows.append({"integrator": integrator, **row})
            print(rows[-1], flush=True)
    result = {
        "command": shlex.join(["python", "lab/tests/programs/endurance.py", *sys.argv[1:]]),
        "seed": 0,
        "versions": versions(),
        "machine": machine(torch.device("cpu")),
        "rows": rows,
    }
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(RESULT, lambda file: file.write(text.encode()))


def endure(integrator: str, steps: int, block: int = BLOCK) -> Iterator[dict[str, Any]]:
    """Train, and after every block of steps tell what has become of the network."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(192, 16), nn.Tanh()
    ).append(nn.Linear(16, 4))
    tdlrt.factorize_(network, rank=0.5)
    optimizer = tdlrt.TDLRT(network, torch.optim.SGD, lr=0.02, momentum=0.9, integrator=integrator)
    times: list[float] = []
    ranks = set()
    for step in range(1, steps + 1):
        optimizer.rank_policy = TOLERANCES[step // HALF_PERIOD % 2]
        images, labels = batch(step, block)

        def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(images), labels)
            loss.backward()
            return loss

        started = time.perf_counter()
        optimizer.step(closure)
        times.append(time.perf_counter() - started)
        ranks.add(tuple(layer.ranks for layer in tucker_layers(network).values()))
        if step % block == 0:
            gc.collect()
            yield {
                "step": step,
                "orthonormality_error": worst_error(network),
                "tensors": sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()),
                "objects": len(gc.get_objects()),
                "resident_mb": resident_bytes() / 1e6,
                "median_ms": 1e3 * statistics.median(times),
                "distinct_ranks": len(ranks),
            }
            times, ranks = [], set()


def batch(step: int, block: int) -> tuple[Tensor, Tensor]:
    """Images of this step, labelled by a linear map that changes with the block."""
    images = torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(step))
    teacher = torch.randn(48, 4, generator=torch.Generator().manual_seed(-1 - step // block))
    return images, (images.flatten(1) @ teacher).argmax(1)


def worst_error(network: nn.Module) -> float:
    """Largest max |U^T U - I| over all bases."""
    layers = tucker_layers(network).values()
    return max(float(orthonormality_error(f.detach())) for layer in layers for f in layer.factors)


def resident_bytes() -> int:
    """Memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
