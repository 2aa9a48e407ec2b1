"""The training loop: a run that can stop after any batch, be stored, and go on exactly."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from tdlrt.errors import RunError
from tdlrt.experiments.config import DEFAULT_TAU, OPTIMIZERS, RAMPS, RunConfig
from tdlrt.experiments.data import ImageData
from tdlrt.experiments.models import build_model
from tdlrt.experiments.results import EpochMetrics
from tdlrt.nn import TuckerLayer
from tdlrt.optim import TDLRT
from tdlrt.ranks import FixedRank, ParameterBudget, RankPolicy, RelativeTolerance
from tdlrt.regularization import spectral_penalty
from tdlrt.report import ModelSummary, summary
from tdlrt.surgery import factorize_

__all__ = ["Training"]

TEST_BATCH = 500

# A ramp ends at this share of the steps before the ranks stay; a budget starts at RAMP_BUDGET.
RAMP_SHARE = 0.75
RAMP_BUDGET = 0.5


class Training:
    """Model, optimiser and schedule of a run, and its position in the data.

    The order of the images is a function of seed and epoch alone, and everything else that the
    next step depends on is in `state_dict`: a run that was stopped and stored continues to the
    same weights, bit for bit on a CPU, as one that was not.

    Attributes:
        config: Options of the run.
        model: The network, on its device.
        epoch: Finished epochs.
        history: Metrics of the finished epochs.
    """

    def __init__(self, config: RunConfig, data: ImageData) -> None:
        self.config = config
        self.device = config.torch_device()
        self.model = build_model(config.model, data.image_shape, len(data.classes))
        if config.method != "dense":
            _factorize(config, self.model)
        self.model.to(self.device)
        # Twice as fast on a CPU. Cores stay as they are: the next change of a rank lays them anew.
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.input_size = (1, *data.image_shape)
        self._train = data.train_images.to(self.device), data.train_labels.to(self.device)
        self._test = data.test_images.to(self.device), data.test_labels.to(self.device)
        self._mean = 255 * torch.tensor(data.mean, device=self.device).view(1, -1, 1, 1)
        self._std = 255 * torch.tensor(data.std, device=self.device).view(1, -1, 1, 1)
        self.steps_per_epoch = -(-len(data.train_labels) // config.batch_size)
        self.steps = config.epochs * self.steps_per_epoch
        self.optimizer = _optimizer(config, self.model, self.steps)
        warmup = min(round(config.warmup * self.steps), self.steps - 1)
        self._schedule = _schedule(self.optimizer, warmup, self.steps)
        self.epoch: int = 0
        self._batch: int = 0
        self.history: list[EpochMetrics] = []
        self._begin_epoch()

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return self.epoch * self.steps_per_epoch + self._batch

    @property
    def finished(self) -> bool:
        """Whether every epoch is done."""
        return self.epoch == self.config.epochs

    @property
    def ranks(self) -> dict[str, list[int]]:
        """Ranks of each Tucker layer."""
        layers = self.model.named_modules()
        return {name: list(m.ranks) for name, m in layers if isinstance(m, TuckerLayer)}

    @property
    def loss(self) -> float:
        """Mean loss over the batches of the current epoch so far."""
        return float(self._loss_sum) / max(1, self._seen)

    def summary(self) -> ModelSummary:
        """Ranks, parameters and multiply-adds for one image, per layer and in all."""
        return summary(self.model, input_size=self.input_size)

    def epochs(
        self, stop_requested: Callable[[], bool], after_step: Callable[["Training"], None]
    ) -> Iterator[EpochMetrics]:
        """Train to the end, or until a stop is requested, and yield the metrics of each epoch.

        Args:
            stop_requested: Asked before every step.
            after_step: Called after every step.

        Raises:
            RunError: The loss is no longer finite.
            NonFiniteError: A gradient or a weight is no longer finite.
        """
        while not self.finished:
            started = time.perf_counter()
            order = self._order()
            while self._batch < self.steps_per_epoch:
                if stop_requested():
                    self._seconds += time.perf_counter() - started
                    return
                start = self._batch * self.config.batch_size
                self._step(order[start : start + self.config.batch_size])
                after_step(self)
            yield self._end_epoch(started)

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on, as tensors and plain types."""
        cuda = self.device.type == "cuda"
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "epoch": self.epoch,
            "batch": self._batch,
            "lr": self._lr,
            "loss_sum": self._loss_sum,
            "correct": self._correct,
            "seconds": self._seconds,
            "rng": torch.get_rng_state(),
            "rng_device": torch.cuda.get_rng_state(self.device) if cuda else None,
            "history": [asdict(metrics) for metrics in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the point at which `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self.epoch, self._batch = state["epoch"], state["batch"]
        self._lr, self._seconds = state["lr"], state["seconds"]
        self._loss_sum.copy_(state["loss_sum"])
        self._correct.copy_(state["correct"])
        self.history = [EpochMetrics(**metrics) for metrics in state["history"]]
        torch.set_rng_state(state["rng"].cpu())
        if state["rng_device"] is not None:
            torch.cuda.set_rng_state(state["rng_device"].cpu(), self.device)

    @property
    def _penalised(self) -> bool:
        """Whether the spectra of the cores count: not before their ranks are found."""
        frozen = isinstance(self.optimizer, TDLRT) and self.optimizer.ranks_frozen
        return frozen and self.config.spectral_penalty > 0

    @property
    def _seen(self) -> int:
        return min(self._batch * self.config.batch_size, len(self._train[1]))

    def _begin_epoch(self) -> None:
        self._batch = 0
        self._lr, self._seconds = 0.0, 0.0
        self._loss_sum = torch.zeros((), device=self.device)
        self._correct = torch.zeros((), dtype=torch.int64, device=self.device)

    def _order(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed * 2**20 + self.epoch)
        return torch.randperm(len(self._train[1]), generator=generator).to(self.device)

    def _step(self, index: Tensor) -> None:
        images, labels = self._normalise(self._train[0][index]), self._train[1][index]
        evaluations: list[tuple[Tensor, Tensor]] = []

        def closure() -> Any:
            self.optimizer.zero_grad()
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
            evaluations.append((loss.detach(), logits.detach()))
            if self._penalised:
                loss = loss + self.config.spectral_penalty * spectral_penalty(self.model)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        self._lr = self._schedule.get_last_lr()[0]
        self.optimizer.step(closure)
        self._schedule.step()
        # `bug` evaluates the closure more than once; the first time is before the step.
        loss, logits = evaluations[0]
        self._loss_sum += loss * len(index)
        self._correct += (logits.argmax(1) == labels).sum()
        self._batch += 1

    def _end_epoch(self, started: float) -> EpochMetrics:
        loss, images = self.loss, self._seen
        if not torch.isfinite(self._loss_sum):
            raise RunError(
                f"epoch {self.epoch + 1}: the loss is {loss}; expected a finite number; "
                f"lower the learning rate (--lr, now {self.config.lr})"
            )
        size = summary(self.model)
        test_accuracy = self._test_accuracy()
        metrics = EpochMetrics(
            epoch=self.epoch + 1,
            loss=loss,
            train_accuracy=100 * int(self._correct) / images,
            test_accuracy=test_accuracy,
            compression=size.compression,
            network_compression=size.network_compression,
            parameters=size.parameters or size.network_parameters,
            ranks=self.ranks,
            lr=self._lr,
            seconds=self._seconds + time.perf_counter() - started,
        )
        self.history.append(metrics)
        self.epoch += 1
        self._begin_epoch()
        return metrics

    @torch.inference_mode()
    def _test_accuracy(self) -> float:
        self.model.eval()
        batches = zip(*(torch.split(part, TEST_BATCH) for part in self._test), strict=True)
        correct = sum((self.model(self._normalise(x)).argmax(1) == y).sum() for x, y in batches)
        self.model.train()
        return 100 * int(correct) / len(self._test[1])

    def _normalise(self, images: Tensor) -> Tensor:
        # Made so from the start: images of one channel would count as laid out already.
        laid = torch.empty(
            images.shape, device=images.device, memory_format=torch.channels_last
        ).copy_(images)
        return laid.sub_(self._mean).div_(self._std)


def _factorize(config: RunConfig, model: nn.Module) -> None:
    """Put the network in Tucker format.

    Free factors start at the norm of the layer: a flat spectrum loses most of it by truncation,
    and there is no tolerance for which learned directions would have to stand out.
    """
    scale = config.init_scale
    if scale == "auto" and config.method == "tucker":
        scale = 1.0
    rank: Any = config.rank  # checked by RunConfig, down to the spelling of "full"
    factorize_(model, rank=rank, init_scale=scale)


def _optimizer(config: RunConfig, model: nn.Module, steps: int) -> torch.optim.Optimizer:
    plain = OPTIMIZERS[config.optimizer]
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        options["momentum"] = config.momentum
    if config.method != "tdlrt":
        return plain(model.parameters(), **options)
    freeze_after = round(config.freeze_at * steps)
    return TDLRT(
        model,
        plain,
        rank_policy=_rank_policy(config, freeze_after),
        integrator=config.integrator,
        adapt_every=config.adapt_every,
        core_steps=config.core_steps,
        freeze_after=freeze_after or None,
        **options,
    )


def _rank_policy(config: RunConfig, freeze_after: int) -> RankPolicy:
    if freeze_after == 0:
        return FixedRank()
    ramp, steps = RAMPS[config.ramp], max(1, round(RAMP_SHARE * freeze_after))
    if config.budget is not None:
        start = max(config.budget, RAMP_BUDGET)
        fraction = ramp(start, config.budget, steps) if ramp else config.budget
        return ParameterBudget(fraction, spare=config.spare)
    end = DEFAULT_TAU if config.tau is None else config.tau
    return RelativeTolerance(ramp(0.0, end, steps) if ramp else end, spare=config.spare)


def _schedule(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> LRScheduler:
    """Learning rates: up along a line for `warmup` steps, then down to 0 along a cosine."""
    if warmup == 0:
        return CosineAnnealingLR(optimizer, steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    return LambdaLR(optimizer, factor)
