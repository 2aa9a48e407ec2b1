"""Fine-tuning with adapters: tdlrt against PEFT's LoRA, LoHa, LoKr and AdaLoRA.

    python benchmarks/adapters.py --data-dir DATA_DIR

A network is trained on half of the classes and fine-tuned on a few thousand images of the others,
with equal numbers of trainable parameters: those of LoRA at the ranks of `RANKS`. The head is
trained in full by all. Every method has the same recipe and its own learning rate, chosen from
`RATES` by the accuracy on held-out training images with seed 0. Writes
benchmarks/results/adapters.json and docs/adapters.md; runs that are there are skipped.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdlrt
from documents import fill_section
from results_table import spread
from tdlrt.experiments.data import ImageData, load_data
from tdlrt.experiments.models import build_model
from tdlrt.experiments.results import machine, versions

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/adapters.json"
DOCUMENT = ROOT / "docs/adapters.md"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
BATCH, TEST_BATCH = 64, 500
TIMED_STEPS = 40


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network, the classes it is trained on first, and what follows.

    Attributes:
        data: Data set.
        build: Makes the network for images of a shape and a number of classes.
        head: Name of its last layer; all other convolutions and linear layers get adapters.
        first: Classes of the first training; the others follow.
        images: Images and epochs of the first training.
        tuning: Images and epochs of the fine-tuning.
        held_out: Training images that choose the learning rate.
        ranks: Ranks of LoRA, which set the numbers of trainable parameters.
    """

    data: str
    build: Callable[[tuple[int, int, int], int], nn.Module]
    head: str
    first: tuple[int, ...]
    images: tuple[int, int]
    tuning: tuple[int, int] = (3000, 3)
    held_out: int = 2000
    ranks: tuple[int, ...] = (2, 4)

    def targets(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the layers that get an adapter."""
        return tuple(
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and name != self.head
        )


TASKS = {
    "LeNet-5, MNIST": Task(
        data="mnist",
        build=lambda shape, classes: build_model("lenet5", shape, classes),
        head="head",
        first=(0, 1, 2, 3, 4),
        images=(20_000, 2),
    ),
}


@dataclass
class Split:
    """Normalised images and labels."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, key: Any) -> "Split":
        return Split(self.images[key], self.labels[key])

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of a size, in the order given."""
        order = torch.arange(len(self)) if order is None else order
        for part in order.split(size):
            yield self.images[part], self.labels[part]


@dataclass
class Adapted:
    """A network ready to be fine-tuned."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    after_step: Callable[[int], None] = lambda step: None
    parameters: Callable[[], int] = lambda: 0


# --- methods ------------------------------------------------------------------------------------


def full(task: Task, model: nn.Module, budget: int, lr: float, steps: int) -> Adapted:
    """All parameters."""
    size = trainable(model) - trainable(model.get_submodule(task.head))
    return Adapted(model, torch.optim.Adam(model.parameters(), lr), parameters=lambda: size)


def head(task: Task, model: nn.Module, budget: int, lr: float, steps: int) -> Adapted:
    """The head alone."""
    model.requires_grad_(False)
    last = model.get_submodule(task.head).requires_grad_(True)
    return Adapted(model, torch.optim.Adam(last.parameters(), lr))


def tdlrt_fixed(task: Task, model: nn.Module, budget: int, lr: float, steps: int) -> Adapted:
    """One rank for all channels, the largest within the budget."""
    return with_tdlrt(task, model, budget, lr, tdlrt.FixedRank())


def tdlrt_budget(task: Task, model: nn.Module, budget: int, lr: float, steps: int) -> Adapted:
    """The same start; TDLRT shares the budget out, in the first half of the training."""
    policy = tdlrt.ParameterBudget(parameters=budget)
    return with_tdlrt(task, model, budget, lr, policy, freeze_after=steps // 2)


def with_tdlrt(
    task: Task, model: nn.Module, budget: int, lr: float, policy: Any, **options: Any
) -> Adapted:
    targets = task.targets(model)
    rank = largest(
        lambda rank: (
            tdlrt.add_adapters_(copy.deepcopy(model), rank=rank, include=targets).parameters
        ),
        budget,
    )
    tdlrt.add_adapters_(model, rank=rank, include=targets, train=task.head)
    optimizer = tdlrt.TDLRT(model, torch.optim.Adam, lr=lr, rank_policy=policy, **options)
    return Adapted(model, optimizer, parameters=lambda: tdlrt.summary(model).parameters)


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def largest(size: Callable[[int], int], budget: int) -> int:
    """Largest rank whose parameters fit the budget, at least 1."""
    rank = 1
    while size(rank + 1) <= budget and rank < 64:
        rank += 1
    return rank


def peft_method(kind: str) -> Callable[..., Adapted]:
    def adapt(task: Task, model: nn.Module, budget: int, lr: float, steps: int) -> Adapted:
        import peft

        shared = {"target_modules": list(task.targets(model))}

        def config(rank: int, **more: Any) -> Any:
            if kind == "AdaLora":
                schedule = {"tinit": steps // 10, "tfinal": steps // 3, "total_step": steps}
                ranks = {"init_r": rank + (rank + 1) // 2, "target_r": rank}
                return peft.AdaLoraConfig(**shared, **schedule, **ranks, **more)
            return getattr(peft, f"{kind}Config")(r=rank, **shared, **more)

        def size(rank: int) -> int:
            # AdaLoRA begins with half again as many and gives them up.
            kept = rank / (rank + (rank + 1) // 2) if kind == "AdaLora" else 1
            adapted = peft.get_peft_model(copy.deepcopy(model), config(rank))
            return round(kept * trainable(adapted))

        rank = largest(size, budget)
        parameters = size(rank)
        adapted = peft.get_peft_model(model, config(rank, modules_to_save=[task.head]))
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr)
        if kind != "AdaLora":
            return Adapted(adapted, optimizer, parameters=lambda: parameters)
        update = adapted.base_model.update_and_allocate
        return Adapted(adapted, optimizer, after_step=update, parameters=lambda: alive(adapted))

    return adapt


def alive(model: nn.Module) -> int:
    """Parameters of the directions that AdaLoRA has kept."""
    total = 0
    for module in model.modules():
        if hasattr(module, "lora_E"):
            for name, values in module.lora_E.items():
                size = module.lora_A[name].shape[1] + module.lora_B[name].shape[0] + 1
                total += int((values != 0).sum()) * size
    return total


METHODS: dict[str, Callable[..., Adapted]] = {
    "tdlrt budget": tdlrt_budget,
    "tdlrt fixed": tdlrt_fixed,
    "LoRA": peft_method("Lora"),
    "AdaLoRA": peft_method("AdaLora"),
    "LoHa": peft_method("LoHa"),
    "LoKr": peft_method("LoKr"),
}
REFERENCES: dict[str, Callable[..., Adapted]] = {"head only": head, "all parameters": full}


# --- runs ---------------------------------------------------------------------------------------


def lora_parameters(task: Task, model: nn.Module, rank: int) -> int:
    """Parameters of LoRA: r (inputs x kernel + outputs), over the layers."""
    shapes = [model.get_submodule(name).weight.shape for name in task.targets(model)]
    return rank * sum(shape[0] + shape[1:].numel() for shape in shapes)


def splits(task: Task, data: ImageData) -> dict[str, Split]:
    """Images of the first training, the fine-tuning, the choice of a rate, and the test."""
    mean = 255 * torch.tensor(data.mean).view(1, -1, 1, 1)
    std = 255 * torch.tensor(data.std).view(1, -1, 1, 1)
    first = torch.zeros(len(data.classes), dtype=torch.bool)
    first[list(task.first)] = True

    def pick(images: Tensor, labels: Tensor, where: Tensor, part: slice) -> Split:
        chosen = where.nonzero()[:, 0][part]
        return Split((images[chosen] - mean) / std, labels[chosen])

    train, test = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    count = task.tuning[0]
    return {
        "first": pick(*train, first[train[1]], slice(task.images[0])),
        "tune": pick(*train, ~first[train[1]], slice(count)),
        "held out": pick(*train, ~first[train[1]], slice(count, count + task.held_out)),
        "test": pick(*test, ~first[test[1]], slice(None)),
    }


def train(adapted: Adapted, part: Split, steps: int, epochs: int) -> None:
    """Train with a cosine schedule."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adapted.optimizer, steps)
    adapted.model.train()
    step = 0
    for _ in range(epochs):
        for x, y in part.batches(BATCH, torch.randperm(len(part))):
            take_step(adapted, x, y, step)
            schedule.step()
            step += 1


def take_step(adapted: Adapted, x: Tensor, y: Tensor, step: int) -> None:
    adapted.optimizer.zero_grad()
    F.cross_entropy(adapted.model(x), y).backward()
    adapted.optimizer.step()
    adapted.after_step(step)


@torch.inference_mode()
def accuracy(model: nn.Module, part: Split) -> float:
    """Share of right answers in percent."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in part.batches(TEST_BATCH))
    return 100 * right / len(part)


class Bench:
    """The runs of one task, in the order in which they are needed; those there are skipped."""

    def __init__(self, name: str, data: ImageData, runs: list[dict[str, Any]]) -> None:
        self.name, self.task, self.data, self.runs = name, TASKS[name], data, runs
        self.parts = splits(self.task, data)
        self.bases: dict[int, nn.Module] = {}

    def base(self, seed: int) -> nn.Module:
        """The network after the first training."""
        if seed not in self.bases:
            torch.manual_seed(seed)
            model = self.task.build(self.data.image_shape, len(self.data.classes))
            steps = self.task.images[1] * -(-len(self.parts["first"]) // BATCH)
            start = Adapted(model, torch.optim.Adam(model.parameters(), 1e-3))
            train(start, self.parts["first"], steps, self.task.images[1])
            self.bases[seed] = model
        return self.bases[seed]

    def run(self, method: str, rank: int | None, lr: float, seed: int) -> dict[str, Any]:
        """One fine-tuning."""
        key = {"task": self.name, "method": method, "rank": rank, "lr": lr, "seed": seed}
        for found in self.runs:
            if key.items() <= found.items():
                return found
        model = copy.deepcopy(self.base(seed))
        torch.manual_seed(1000 + seed)
        images, epochs = self.task.tuning
        steps = epochs * -(-images // BATCH)
        budget = lora_parameters(self.task, model, rank or 0)
        adapted = (METHODS | REFERENCES)[method](self.task, model, budget, lr, steps)
        train(adapted, self.parts["tune"], steps, epochs)
        measured = {
            "budget": budget,
            "parameters": adapted.parameters(),
            "held_out": accuracy(adapted.model, self.parts["held out"]),
            "accuracy": accuracy(adapted.model, self.parts["test"]),
        }
        self.runs.append(key | measured)
        print(self.runs[-1], flush=True)
        store(self.runs)
        return self.runs[-1]

    def times(self, rank: int) -> dict[str, float]:
        """Milliseconds of the fastest of some steps of each method, taken in turns."""
        torch.manual_seed(0)
        model = self.task.build(self.data.image_shape, len(self.data.classes))
        budget = lora_parameters(self.task, model, rank)
        x, y = next(self.parts["tune"].batches(BATCH))
        all_adapted = {
            name: adapt(self.task, copy.deepcopy(model), budget, 1e-4, 1000)
            for name, adapt in (REFERENCES | METHODS).items()
        }
        best = dict.fromkeys(all_adapted, math.inf)
        for step in range(TIMED_STEPS):
            for name, adapted in all_adapted.items():
                started = time.perf_counter()
                take_step(adapted, x, y, step)
                best[name] = min(best[name], 1000 * (time.perf_counter() - started))
        return best

    def row(self, method: str, rank: int | None, seeds: list[int]) -> None:
        """A method at its best rate."""
        tried = [self.run(method, rank, lr, 0) for lr in RATES]
        best = max(tried, key=lambda run: run["held_out"])["lr"]
        for seed in seeds:
            self.run(method, rank, best, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with mnist/train.parquet; default: the hub")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    arguments = parser.parse_args()
    runs = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else []
    times: dict[str, dict[str, float]] = {}
    for name in arguments.only:
        bench = Bench(name, load_data(TASKS[name].data, arguments.data_dir), runs)
        for method in REFERENCES:
            bench.row(method, None, arguments.seeds)
        for rank in TASKS[name].ranks:
            for method in METHODS:
                bench.row(method, rank, arguments.seeds)
            times[f"{name}, rank {rank}"] = bench.times(rank)
    store(runs, times)
    write_table(runs, arguments.seeds, times)


def store(runs: list[dict[str, Any]], times: dict[str, dict[str, float]] | None = None) -> None:
    """Write the result file."""
    result = {
        "command": "python benchmarks/adapters.py --data-dir DATA_DIR",
        "versions": versions() | {"peft": version("peft")},
        "machine": machine(torch.device("cpu")),
        "note": "Other work ran on the machine while steps were timed.",
        "milliseconds_per_step": times,
        "runs": runs,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def write_table(
    runs: list[dict[str, Any]], seeds: list[int], times: dict[str, dict[str, float]]
) -> None:
    """Put the comparison in the document."""
    heads = ["task", "budget", "method", "parameters", "learning rate", "accuracy (%)", "step time"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["task"], run["method"], run["budget"]), []).append(run)
    order = [*TASKS, *REFERENCES, *METHODS]
    keys = sorted(groups, key=lambda key: (order.index(key[0]), key[2], order.index(key[1])))
    for task, method, budget in keys:
        group = groups[task, method, budget]
        tried = [run for run in group if run["seed"] == 0]
        best = max(tried, key=lambda run: run["held_out"])["lr"]
        chosen = [run for run in group if run["lr"] == best and run["seed"] in seeds]
        rank = chosen[0]["rank"] or TASKS[task].ranks[0]
        found = times[f"{task}, rank {rank}"]
        ratio = found[method] / found["all parameters"]
        size = statistics.fmean(run["parameters"] for run in chosen)
        cells = [task, f"{budget:,}" if budget else "", method, f"{size:,.0f}", f"{best:g}"]
        cells += [spread([run["accuracy"] for run in chosen], 2), f"{ratio:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    fill_section(DOCUMENT, "adapters", lines)


if __name__ == "__main__":
    main()
