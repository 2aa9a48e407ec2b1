"""Memory of a training step against dense: parameters, gradients, optimiser state, activations.

    python benchmarks/memory.py

Every case runs in a process of its own, a few steps, and reports

- kept: bytes of the weights of the factorised layers, their gradients and the optimiser's state;
- saved: bytes that autograd keeps between forward and backward, each storage once;
- peak: how far the resident set (CUDA: the allocated memory) rose above that before the model;
  on a CPU with an allocator that returns what is freed, so that it is memory in use, and once more
  with the system's settings, under which freed memory may stay with the process.

Adapts in every step, to a tolerance that leaves the ranks where they start. Writes
benchmarks/results/memory.json and docs/memory.md.
"""

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import tdlrt
from saved import saved_bytes
from tdlrt.nn.models import tucker_layers
from tdlrt_lab.models import build_model
from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.files import write_text

ROOT = Path(__file__).parent.parent
RESULTS = {
    "cpu": ROOT / "benchmarks/results/memory.json",
    "cuda": ROOT / "benchmarks/results/memory_cuda.json",
}
RANKS = (0.5, 0.3, 0.2, 0.1)
MEASURED = ("kept", "saved", "peak", "peak_by_default")
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 1e-6, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 1e-8}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vgg16", "resnet18"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", choices=RESULTS, default="cpu")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(**json.loads(arguments.case))))
        return
    rows = []
    for model in arguments.models:
        for optimizer in OPTIMIZERS:
            for rank, recompute in [(None, False), *itertools.product(RANKS, (False, True))]:
                case = {
                    "model": model,
                    "optimizer": optimizer,
                    "rank": rank,
                    "recompute": recompute,
                    "batch": arguments.batch,
                    "device": arguments.device,
                }
                rows.append(case | in_process(case, RETURNING))
                if arguments.device == "cpu":
                    rows[-1]["peak_by_default"] = in_process(case, {})["peak"]
                print(rows[-1], flush=True)
    result = {
        **made_by(
            shlex.join(["python", "benchmarks/memory.py", *sys.argv[1:]]), device=arguments.device
        ),
        "rows": rows,
    }
    write_text(RESULTS[arguments.device], json.dumps(result, indent=1) + "\n")
    results = [json.loads(path.read_text()) for path in RESULTS.values() if path.exists()]
    (ROOT / "docs/memory.md").write_text(document(results), encoding="utf-8")


def in_process(
    case: dict[str, Any], environment: dict[str, str], script: str = __file__
) -> dict[str, Any]:
    """What the script's `measure` finds in a process of its own."""
    words = [sys.executable, script, "--case", json.dumps(case)]
    settings = {**os.environ, **environment}
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=settings)
    return json.loads(done.stdout)


def measure(
    model: str, optimizer: str, rank: float | None, recompute: bool, batch: int, device: str
) -> dict[str, Any]:
    """Bytes of one case."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), device=device)
    before = peak(device)
    network = build_model(model, (3, 32, 32), 10)
    hits = {row.name for row in tdlrt.factorize_(network, rank=0.5, dry_run=True).factorized}
    optimizer_cls, options = OPTIMIZERS[optimizer]
    compression = 0.0
    if rank is None:
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        trained: torch.optim.Optimizer = optimizer_cls(network.parameters(), **options)
    else:
        tdlrt.factorize_(network, rank=rank)
        compression = tdlrt.summary(network).compression
        for layer in tucker_layers(network).values():
            layer.recompute = recompute
        network.to(device)
        policy = tdlrt.RelativeTolerance(0.01)
        trained = tdlrt.TDLRT(network, optimizer_cls, rank_policy=policy, **options)
    for _ in range(3):
        trained.zero_grad()
        saved, loss = saved_bytes(network, lambda: F.cross_entropy(network(images), labels))
        loss.backward()
        trained.step()
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    return {
        "compression": compression,
        "kept": kept_bytes(weights(network, hits), trained),
        "saved": saved,
        "peak": peak(device) - before,
    }


def line(row: dict[str, Any], dense: dict[str, Any]) -> str:
    """One line of the table: everything relative to the dense network."""
    names = [name for name in MEASURED if name in row]
    shares = [row[name] / dense[name] for name in names]
    cells = [row["model"], row["optimizer"], str(row["rank"]), f"{100 * row['compression']:.1f}"]
    cells += ["yes" if row["recompute"] else "no", *(f"{share:.2f}" for share in shares)]
    return f"| {' | '.join(cells)} |"


def section(result: dict[str, Any]) -> str:
    """The table of a device."""
    rows = result["rows"]
    dense = {(row["model"], row["optimizer"]): row for row in rows if row["rank"] is None}
    table = "\n".join(
        line(row, dense[row["model"], row["optimizer"]]) for row in rows if row["rank"] is not None
    )
    facts = [
        ", ".join(f"{key} {value}" for key, value in result[name].items())
        for name in ("versions", "machine")
    ]
    head = ["network", "optimiser", "rank", "compression (%)", "recompute"]
    head += [name.replace("_", " ") for name in MEASURED if name in rows[0]]
    return f"""\
## On a {"CPU" if result["machine"]["device"] == "cpu" else "GPU"}

`{result["command"]}`, batch {rows[0]["batch"]}; {facts[0]}; {facts[1]}

| {" | ".join(head)} |
|{" --- |" * len(head)}
{table}
"""


def document(results: Sequence[dict[str, Any]]) -> str:
    """The page docs/memory.md."""
    return f"""\
# Memory of a training step

How much memory does a training step need beside that of the dense network? This page gives what is
kept, what autograd saves and the peak, on a CPU and on a GPU.

Written by `python benchmarks/memory.py`; do not edit.

Relative to the dense network with torch's optimiser, 32x32 images, ranks examined in every step.
*Kept* is weights, gradients and state of the factorised layers; *saved* what autograd keeps of the
whole network between the passes; *peak* how far the process grew, each network in a process of its
own, with an allocator that returns what is freed: the memory in use. *Peak by default* is the same
with the system's allocator, whose freed blocks may stay with the process. On a GPU *peak* is the
most that was allocated there. *Recompute* is `layer.recompute`.

{chr(10).join(section(result) for result in results)}"""


def weights(network: torch.nn.Module, names: set[str]) -> list[Tensor]:
    """The parameters of the layers by these names, without biases."""
    return [
        parameter
        for name in names
        for key, parameter in network.get_submodule(name).named_parameters()
        if key != "bias"
    ]


def kept_bytes(parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, their gradients and the optimiser's state of them."""
    total = 0
    for parameter in parameters:
        state = [v for v in optimizer.state.get(parameter, {}).values() if v.ndim]
        tensors = [parameter, parameter.grad, *state]
        total += sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return total


def peak(device: str) -> int:
    """Most bytes that this process has held so far; getrusage counts the one that started it."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main()
