"""The methods of benchmarks/adapters.py: what is trained, at a number of parameters."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdlrt
from adapter_tasks import Split, Task

BATCH = 64


@dataclass
class Adapted:
    """A network ready to be fine-tuned."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    after_step: Callable[[int], None] = lambda step: None
    parameters: Callable[[], int] = lambda: 0


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
            if kind == "LoKr":
                more["decompose_factor"] = task.lokr_factor
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
    backward(adapted, x, y)
    adapted.optimizer.step()
    adapted.after_step(step)


def backward(adapted: Adapted, x: Tensor, y: Tensor) -> None:
    adapted.optimizer.zero_grad()
    F.cross_entropy(adapted.model(x), y).backward()
