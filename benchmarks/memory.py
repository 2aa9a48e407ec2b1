"""Memory of a training step against dense: parameters, gradients, optimiser state, activations.

    python benchmarks/memory.py

Every case runs in a process of its own, a few steps, and reports

- kept: bytes of the weights of the factorised layers, their gradients and the optimiser's state;
- saved: bytes that autograd keeps between forward and backward, each storage once;
- peak: how far the resident set (CUDA: the allocated memory) rose above that before the model.

Adapts in every step, to a tolerance that leaves the ranks where they start. Writes
benchmarks/results/memory.json.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import tdlrt
from tdlrt.experiments.models import build_model
from tdlrt.experiments.results import machine, versions, write_atomically

RESULT = Path(__file__).parent / "results/memory.json"
RANKS = (None, 0.6, 0.5, 0.3, 0.2, 0.1)  # None is the dense network
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 1e-6, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 1e-8}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vgg16", "resnet18"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(**json.loads(arguments.case))))
        return
    rows = []
    for model in arguments.models:
        for optimizer in OPTIMIZERS:
            for rank in RANKS:
                case = {
                    "model": model,
                    "optimizer": optimizer,
                    "rank": rank,
                    "batch": arguments.batch,
                    "device": arguments.device,
                }
                words = [sys.executable, __file__, "--case", json.dumps(case)]
                done = subprocess.run(words, check=True, capture_output=True, text=True)
                rows.append(case | json.loads(done.stdout))
                print(rows[-1], flush=True)
    result = {
        "command": "python benchmarks/memory.py",
        "versions": versions(),
        "machine": machine(torch.device(arguments.device)),
        "rows": rows,
    }
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(RESULT, lambda file: file.write(text.encode()))


def measure(
    model: str, optimizer: str, rank: float | None, batch: int, device: str
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
        network.to(device)
        policy = tdlrt.RelativeTolerance(0.01)
        trained = tdlrt.TDLRT(network, optimizer_cls, rank_policy=policy, **options)
    saved = 0
    for _ in range(3):
        trained.zero_grad()
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor, seen: dict[int, int] = storages) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = F.cross_entropy(network(images), labels)
        own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        saved = sum(size for address, size in storages.items() if address not in own)
        loss.backward()
        kept = kept_bytes(network, trained, hits)
        trained.step()
    return {
        "compression": compression,
        "kept": max(kept, kept_bytes(network, trained, hits)),
        "saved": saved,
        "peak": peak(device) - before,
    }


def kept_bytes(network: torch.nn.Module, optimizer: torch.optim.Optimizer, hits: set[str]) -> int:
    """Bytes of weights, gradients and state of the layers by these names."""
    total = 0
    for name in hits:
        for key, parameter in network.get_submodule(name).named_parameters():
            if key != "bias":
                state = [v for v in optimizer.state.get(parameter, {}).values() if v.ndim]
                tensors = [parameter, parameter.grad, *state]
                total += sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return total


def peak(device: str) -> int:
    """Most bytes that this process has held so far."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
