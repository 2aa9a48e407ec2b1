"""Where a training step on a GPU spends its time: kernels, how long they run, what launches them.

    python benchmarks/timeline.py

Profiles steps of VGG16 on 32x32 images with torch.profiler, dense and at fixed and changing ranks.
Writes benchmarks/results/timeline.json and docs/gpu.md; needs CUDA.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import tdlrt
from tdlrt.ranks import RankPolicy
from tdlrt_lab.models import build_model
from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.files import write_text

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/timeline.json"
STEPS = 3

SGD = (torch.optim.SGD, {"lr": 1e-6, "momentum": 0.9})
ADAM = (torch.optim.Adam, {"lr": 1e-6})
CASES = {
    "ranks fixed, Adam": (ADAM, tdlrt.FixedRank()),
    "ranks examined in every step, SGD": (SGD, tdlrt.RelativeTolerance(0.01)),
    "budget examined in every step, Adam": (ADAM, tdlrt.ParameterBudget(0.05, spare=0.25)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rank", type=float, default=0.1)
    arguments = parser.parse_args()
    rows = []
    for name, (optimizer, policy) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            trace(step(arguments.batch, arguments.rank, optimizer, policy), path)
            rows.append({"step": name, **summarise(json.loads(path.read_text())["traceEvents"])})
    store(rows, arguments.batch, arguments.rank)


def step(
    batch: int, rank: float, optimizer: tuple[Any, dict[str, float]], policy: RankPolicy
) -> Callable[[], object]:
    """A training step of VGG16 in Tucker format."""
    torch.manual_seed(0)
    model: nn.Module = build_model("vgg16", (3, 32, 32), 10)
    tdlrt.factorize_(model, rank=rank)
    model.cuda()
    cls, options = optimizer
    trained = tdlrt.TDLRT(model, cls, rank_policy=policy, **options)
    images = torch.randn(batch, 3, 32, 32, device="cuda")
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), device="cuda")

    def run() -> None:
        trained.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        trained.step()

    return run


def trace(run: Callable[[], object], path: Path) -> None:
    """Profile some steps after a warm-up."""
    for _ in range(STEPS):
        run()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            run()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))


def summarise(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of a step, times in milliseconds, from the events of a trace."""
    kinds: dict[str, list[dict[str, Any]]] = {"kernel": [], "cuda_runtime": [], "cpu_op": []}
    for event in events:
        if event.get("cat") in kinds:
            kinds[event["cat"]].append(event)
    calls = kinds["cuda_runtime"]
    span = max(e["ts"] + e["dur"] for e in calls) - min(e["ts"] for e in calls)
    return {
        "profiled_ms": span / 1e3 / STEPS,
        "gpu_busy_ms": sum(event["dur"] for event in kinds["kernel"]) / 1e3 / STEPS,
        "kernels": len(kinds["kernel"]) // STEPS,
        "waits": sum(event["name"] == "cudaStreamSynchronize" for event in calls) // STEPS,
        "largest_kernels": largest(kinds["kernel"]),
        "largest_operations": largest(kinds["cpu_op"]),
    }


def largest(events: Iterable[dict[str, Any]], count: int = 5) -> list[dict[str, Any]]:
    """Names with the most time, and how often they ran in a step."""
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        name = event["name"].removeprefix("void ").split("<")[0].split("(")[0]
        if name.startswith("aten::_"):  # its time is in that of its caller
            continue
        times[name] += event["dur"] / 1e3 / STEPS
        calls[name] += 1
    return [
        {"name": name, "ms": ms, "calls": calls[name] // STEPS}
        for name, ms in times.most_common(count)
    ]


def store(rows: list[dict[str, Any]], batch: int, rank: float) -> None:
    result = {
        **made_by(f"python benchmarks/timeline.py --batch {batch} --rank {rank:g}", device="cuda"),
        "batch": batch,
        "rank": rank,
        "rows": rows,
    }
    write_text(RESULT, json.dumps(result, indent=1) + "\n")
    (ROOT / "docs/gpu.md").write_text(document(result), encoding="utf-8")


def document(result: dict[str, Any]) -> str:
    """The page docs/gpu.md."""
    lines = [
        f"| {row['step']} | {row['profiled_ms']:.0f} | {row['gpu_busy_ms']:.0f} | "
        f"{row['kernels']:,} | {row['waits']} | {names(row['largest_kernels'])} | "
        f"{names(row['largest_operations'])} |"
        for row in result["rows"]
    ]
    facts = {**result["versions"], **result["machine"]}
    return f"""\
# A step on a GPU

Where does the time of a training step on a GPU go? This page gives what a profiler saw.

Written by `{result["command"]}`; do not edit.

VGG16, 32x32 images, batch {result["batch"]}, ranks at {result["rank"]:g} of the channels. Under the
profiler, which slows down the launching: milliseconds of a step, those in which the GPU computes,
kernels, waits of the CPU for the GPU, and what takes longest (milliseconds, calls).

| step | time | GPU busy | kernels | waits | longest kernels | longest operations |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(lines)}

With layers of this size a GPU waits for launches more than for kernels, see the column of its busy
time, unless a step is captured as one graph (`tdlrt.GraphedStep`). Inference has few kernels: as
one CUDA graph it takes less time than the dense network's.

{", ".join(f"{key} {value}" for key, value in facts.items())}
"""


def names(rows: Iterable[dict[str, Any]]) -> str:
    return ", ".join(
        f"{row['name'].split('::')[-1][:30]} ({row['ms']:.1f}, {row['calls']})" for row in rows
    )


if __name__ == "__main__":
    main()
