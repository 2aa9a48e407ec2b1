"""Fine-tuning with adapters: tdlrt against PEFT's LoRA, LoHa, LoKr and AdaLoRA.

    python benchmarks/adapters.py --data-dir DATA_DIR

A network is trained on half of the classes and fine-tuned on a few thousand images of the others,
with equal numbers of trainable parameters: those of LoRA at the ranks of each task. The head is
trained in full by all. Every method has the same recipe and its own learning rate, chosen by the
accuracy on held-out training images with seed 0: from 0.01 up, or else down, the ladder RATES for
as long as that rises. Writes benchmarks/results/adapters.json and docs/adapters.md; what is there
is not measured again.
"""

import argparse
import copy
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapter_methods import (
    BATCH,
    METHODS,
    REFERENCES,
    Adapted,
    backward,
    take_step,
    train,
)
from adapter_tasks import TASKS, splits
from memory import in_process, kept_bytes, peak
from tdlrt_lab.data import ImageData, load_data
from tdlrt_lab.documents import fill_section
from tdlrt_lab.run.accuracy import accuracy
from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.files import write_text
from tdlrt_lab.spread import format_spread

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/adapters.json"
DOCUMENT = ROOT / "docs/adapters.md"
ALL = REFERENCES | METHODS
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
FIRST_RATE = RATES.index(1e-2)
TIMED_STEPS = 40
# Blocks of a page and more go back to the system when they are freed.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "4096"}

Result = dict[str, Any]


class Bench:
    """The runs of one task, in the order in which they are needed; those there are skipped."""

    def __init__(self, name: str, data: ImageData, result: Result) -> None:
        self.name, self.task, self.data, self.result = name, TASKS[name], data, result
        self.shape, self.classes = data.image_shape, len(data.classes)
        self.parts = splits(self.task, data)
        self.bases: dict[int, nn.Module] = {}

    def base(self, seed: int) -> nn.Module:
        """The network after the first training."""
        if seed not in self.bases:
            torch.manual_seed(seed)
            model = self.task.build(self.shape, self.classes)
            steps = self.task.images[1] * -(-len(self.parts["first"]) // BATCH)
            start = Adapted(model, torch.optim.Adam(model.parameters(), 1e-3))
            train(start, self.parts["first"], steps, self.task.images[1])
            reached = self.accuracy(model, "first test")
            self.result["first_training"][f"{self.name}, seed {seed}"] = reached
            self.bases[seed] = model
        return self.bases[seed]

    def accuracy(self, model: nn.Module, part: str) -> float:
        """Share of a part's images, in percent, that a network classifies rightly."""
        return accuracy(model.eval(), self.parts[part].images, self.parts[part].labels)

    def run(self, method: str, rank: int | None, lr: float, seed: int) -> dict[str, Any]:
        """One fine-tuning."""
        key = {"task": self.name, "method": method, "rank": rank, "lr": lr, "seed": seed}
        for found in self.result["runs"]:
            if key.items() <= found.items():
                return found
        model = copy.deepcopy(self.base(seed))
        torch.manual_seed(1000 + seed)
        images, epochs = self.task.tuning
        steps = epochs * -(-images // BATCH)
        budget = self.task.lora_parameters(model, rank or 0)
        adapted = ALL[method](self.task, model, budget, lr, steps)
        train(adapted, self.parts["tune"], steps, epochs)
        measured = {
            "budget": budget,
            "parameters": adapted.parameters(),
            "held_out": self.accuracy(adapted.model, "held out"),
            "accuracy": self.accuracy(adapted.model, "test"),
        }
        print(key | measured, flush=True)
        self.result["runs"].append(key | measured)
        store(self.result)
        return key | measured

    def row(self, method: str, rank: int | None, seeds: list[int]) -> None:
        """A method at its best rate."""
        best = climbed(lambda lr: self.run(method, rank, lr, 0)["held_out"])
        for seed in seeds:
            self.run(method, rank, best, seed)

    def costs(self, rank: int) -> None:
        """Step time and memory of all methods."""
        group = f"{self.name}, rank {rank}"
        if group in self.result["bytes"]:
            return
        self.result["milliseconds_per_step"][group] = self.times(rank)
        case = {"task": self.name, "rank": rank, "shape": self.shape, "classes": self.classes}
        self.result["bytes"][group] = {
            method: in_process(case | {"method": method}, RETURNING, __file__) for method in ALL
        }
        print(group, self.result["bytes"][group], flush=True)
        store(self.result)

    def times(self, rank: int) -> dict[str, float]:
        """Milliseconds of the fastest of some steps of each method, taken in turns."""
        torch.manual_seed(0)
        model = self.task.build(self.shape, self.classes)
        budget = self.task.lora_parameters(model, rank)
        x, y = next(self.parts["tune"].batches(BATCH))
        all_adapted = {
            name: adapt(self.task, copy.deepcopy(model), budget, 1e-4, 1000)
            for name, adapt in ALL.items()
        }
        best = dict.fromkeys(all_adapted, math.inf)
        for step in range(TIMED_STEPS):
            for name, adapted in all_adapted.items():
                started = time.perf_counter()
                take_step(adapted, x, y, step)
                best[name] = min(best[name], 1000 * (time.perf_counter() - started))
        return best


def climbed(score: Callable[[float], float]) -> float:
    """The rate reached from FIRST_RATE by going up, or else down, while the score rises."""
    best = FIRST_RATE
    for step in (1, -1):
        while 0 <= best + step < len(RATES) and score(RATES[best + step]) > score(RATES[best]):
            best += step
    return RATES[best]


def measure(task: str, method: str, rank: int, shape: list[int], classes: int) -> dict[str, int]:
    """Bytes that a fine-tuning takes: at its peak, and those kept from step to step."""
    x, y = torch.randn(BATCH, *shape), torch.randint(0, classes, (BATCH,))

    def fine_tune() -> int:
        torch.manual_seed(0)
        model = TASKS[task].build((shape[0], shape[1], shape[2]), classes)
        budget = TASKS[task].lora_parameters(model, rank)
        adapted = ALL[method](TASKS[task], model, budget, 1e-4, 1000)
        for step in range(3):
            take_step(adapted, x, y, step)
        backward(adapted, x, y)
        trained = (p for p in adapted.model.parameters() if p.requires_grad)
        return kept_bytes(trained, adapted.optimizer)

    fine_tune()  # what the libraries load with their first steps is not counted
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is what there is now
    before = peak("cpu")
    return {"kept": fine_tune(), "peak": peak("cpu") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with mnist/train.parquet; default: the hub")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case:
        print(json.dumps(measure(**json.loads(arguments.case))))
        return
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    for name in ("first_training", "milliseconds_per_step", "bytes"):
        result.setdefault(name, {})
    result["runs"] = result.pop("runs", [])
    for name in arguments.only:
        bench = Bench(name, load_data(TASKS[name].data, arguments.data_dir), result)
        for method in REFERENCES:
            bench.row(method, None, arguments.seeds)
        for rank in TASKS[name].ranks:
            for method in METHODS:
                bench.row(method, rank, arguments.seeds)
            bench.costs(rank)
    fill_section(DOCUMENT, "adapters", table(result, arguments.seeds))


def store(result: Result) -> None:
    """Write the result file."""
    facts = {
        **made_by("python benchmarks/adapters.py --data-dir DATA_DIR", "peft", "transformers"),
        "note": "Other work ran on the machine while steps were timed.",
    }
    write_text(RESULT, json.dumps(facts | result | facts, indent=1) + "\n")


def table(result: Result, seeds: list[int]) -> list[str]:
    """The comparison, a line per method and budget."""
    heads = ["task", "budget", "method", "parameters", "learning rate", "accuracy (%)"]
    heads += ["step time", "kept (KiB)", "peak (MiB)"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for run in result["runs"]:
        groups.setdefault((run["task"], run["budget"], run["method"]), []).append(run)
    tasks, methods = list(TASKS), list(ALL)
    order = sorted(groups, key=lambda key: (tasks.index(key[0]), key[1], methods.index(key[2])))
    for task, budget, method in order:
        group = groups[task, budget, method]
        tried = [run for run in group if run["seed"] == 0]
        best = max(tried, key=lambda run: run["held_out"])["lr"]
        chosen = [run for run in group if run["lr"] == best and run["seed"] in seeds]
        costs = f"{task}, rank {chosen[0]['rank'] or TASKS[task].ranks[0]}"
        times, memory = result["milliseconds_per_step"][costs], result["bytes"][costs][method]
        size = statistics.fmean(run["parameters"] for run in chosen)
        cells = [task, f"{budget:,}" if budget else "", method, f"{size:,.0f}", f"{best:g}"]
        cells += [format_spread([run["accuracy"] for run in chosen], 2)]
        cells += [f"{times[method] / times['LoRA']:.1f}"]
        cells += [f"{memory['kept'] / 2**10:,.0f}", f"{memory['peak'] / 2**20:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
