"""The training loop: a run that can stop after any batch, be stored, and go on exactly."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from tdlrt.errors import NonFiniteError
from tdlrt.nn import TuckerLayer
from tdlrt.report import ModelSummary, summary
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import ImageData
from tdlrt_lab.data.augmentation import draw_moves, move_images
from tdlrt_lab.methods import METHODS
from tdlrt_lab.methods.sizes import kept_parameters
from tdlrt_lab.models import build_model
from tdlrt_lab.run.accuracy import accuracy
from tdlrt_lab.run.finite import check_gradients
from tdlrt_lab.run.metrics import EpochMetrics
from tdlrt_lab.run.processes import (
    engine,
    is_first,
    process_count,
    share,
    take_buffers,
    total,
)

__all__ = ["Size", "Training"]


class Size(NamedTuple):
    """Parameters of the layers that a method makes small, without biases, and of the network."""

    parameters: int
    dense_parameters: int
    network_parameters: int
    network_dense_parameters: int

    @property
    def compression(self) -> float:
        """1 - parameters / dense_parameters over these layers; 0 if the method has none."""
        return 1 - self.parameters / self.dense_parameters if self.dense_parameters else 0.0

    @property
    def network_compression(self) -> float:
        """The same over all parameters."""
        return 1 - self.network_parameters / self.network_dense_parameters


class Training:
    """Model, optimiser and schedule of a run, and its position in the data.

    The order of the images is a function of seed and epoch alone, and everything else that the
    next step depends on is in `state_dict`: a run that was stopped and stored continues to the
    same weights, bit for bit on a CPU, as one that was not.

    Attributes:
        config: Options of the run.
        method: How the network is trained and made small.
        model: The network, on its device.
        layers: The layers that the method makes small, with the size of their dense weights.
        optimizer: The optimiser of all parameters.
        classes: Number of classes.
        epoch: Finished epochs.
        history: Metrics of the finished epochs.
        skipped_steps: Steps so far that were skipped, as they were not finite.
        skipped_in_a_row: Those of them since the last step that was taken.
    """

    def __init__(self, config: RunConfig, data: ImageData) -> None:
        self.config = config
        self.device = config.torch_device()
        self.method = METHODS[config.method]
        self.classes = len(data.classes)
        self.input_size = (1, *data.image_shape)
        self.model = build_model(config.model, data.image_shape, self.classes)
        self.dense_macs = summary(self.model, input_size=self.input_size).macs
        self._network_dense_parameters = kept_parameters(self.model)
        self.layers = self.method.prepare(self.model, config)
        self.model.to(self.device)
        self._lay_out()
        self._train = data.train_images.to(self.device), data.train_labels.to(self.device)
        self._split = data.split
        self._test = data.test_images.to(self.device), data.test_labels.to(self.device)
        self._mean = 255 * torch.tensor(data.mean, device=self.device).view(1, -1, 1, 1)
        self._std = 255 * torch.tensor(data.std, device=self.device).view(1, -1, 1, 1)
        self.steps_per_epoch = -(-len(data.train_labels) // config.batch_size)
        self.steps = config.epochs * self.steps_per_epoch
        self.dense_steps = max(1, round(config.dense_until * self.steps))
        self.optimizer = self.method.optimizer(self.model, config, self.steps)
        self._engine: nn.Module | None = None
        self._warmup = min(round(config.warmup * self.steps), self.steps - 1)
        self._schedule = _schedule(self.optimizer, self._warmup, self.steps)
        self.epoch: int = 0
        self._batch: int = 0
        self._seen: int = 0  # images of the epoch in steps that were taken
        self.history: list[EpochMetrics] = []
        self.skipped_steps = self.skipped_in_a_row = 0
        self._begin_epoch()
        self.method.begin(self)

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
        """Mean loss over the batches of the current epoch so far; NaN if all were skipped."""
        return float(self._loss_sum) / self._seen if self._seen else math.nan

    @property
    def size(self) -> Size:
        """Parameters now, and of the dense network."""
        layers = [self.model.get_submodule(name) for name in self.layers]
        return Size(
            sum(kept_parameters(layer, biases=False) for layer in layers),
            sum(self.layers.values()),
            kept_parameters(self.model),
            self._network_dense_parameters,
        )

    def summary(self) -> ModelSummary:
        """Ranks, parameters and multiply-adds for one image, of each layer there is now."""
        return summary(self.model, input_size=self.input_size)

    def rebuild(self) -> None:
        """Take up a network whose parameters are others now: a new optimiser, the old schedule."""
        self._engine = None
        rate, schedule = self.optimizer.param_groups[0]["lr"], self._schedule.state_dict()
        self._lay_out()
        self.optimizer = self.method.optimizer(self.model, self.config, self.steps)
        self._schedule = _schedule(self.optimizer, self._warmup, self.steps)
        self._schedule.load_state_dict(schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _lay_out(self) -> None:
        # Twice as fast on a CPU. Cores stay as they are: the next change of a rank lays them anew.
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def epochs(
        self, stop_requested: Callable[[], bool], after_step: Callable[["Training"], None]
    ) -> Iterator[EpochMetrics]:
        """Train to the end, or until a stop is requested, and yield the metrics of each epoch.

        Args:
            stop_requested: Asked before every step.
            after_step: Called after every step.

        Raises:
            NonFiniteError: Loss, gradients or weights were not finite in more than
                `skip_nonfinite` steps in a row, the last of which changed nothing; or the mean
                loss of an epoch is not finite.
        """
        while not self.finished:
            self._since = time.perf_counter()
            order, moves = self.order(), self._moves()
            while self._batch < self.steps_per_epoch:
                if stop_requested():
                    return
                start = self._batch * self.config.batch_size
                index = order[start : start + self.config.batch_size]
                self._step(index, moves)
                self._lap()
                after_step(self)
            yield self._end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on, as tensors and plain types.

        Of several processes each must call it.
        """
        cuda = self.device.type == "cuda"
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "epoch": self.epoch,
            "batch": self._batch,
            "lr": self._lr,
            "loss_sum": total(self._loss_sum),
            "correct": total(self._correct),
            "seen": self._seen,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "seconds": self._seconds,
            "rng": torch.get_rng_state(),
            "rng_device": torch.cuda.get_rng_state(self.device) if cuda else None,
            "history": [asdict(metrics) for metrics in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the point at which `state_dict` was taken."""
        self.method.restore(self, state["model"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self.epoch, self._batch = state["epoch"], state["batch"]
        self._lr, self._seconds = state["lr"], state["seconds"]
        self._loss_sum.copy_(state["loss_sum"])
        self._correct.copy_(state["correct"])
        # A run that an earlier version stored has skipped none.
        all_seen = min(self._batch * self.config.batch_size, len(self._train[1]))
        self._seen = state.get("seen", all_seen)
        self.skipped_steps = state.get("skipped_steps", 0)
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        if not is_first():  # the others' parts are in the first one's
            self._loss_sum.zero_()
            self._correct.zero_()
        self.history = [EpochMetrics(**metrics) for metrics in state["history"]]
        torch.set_rng_state(state["rng"].cpu())
        if state["rng_device"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_device"].cpu(), self.device)

    def _begin_epoch(self) -> None:
        self._batch = self._seen = 0
        self._lr, self._seconds = 0.0, 0.0
        self._since = time.perf_counter()
        self._loss_sum = torch.zeros((), device=self.device)
        self._correct = torch.zeros((), dtype=torch.int64, device=self.device)

    def _lap(self) -> None:
        """Add the time since the last call to that of the epoch."""
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + now - self._since, now

    def order(self) -> Tensor:
        """The training images in the order of this epoch."""
        return torch.randperm(len(self._train[1]), generator=self._generator(0)).to(self.device)

    def _moves(self) -> Tensor | None:
        """How each training image is augmented in this epoch."""
        if self.config.augment == "none":
            return None
        return draw_moves(len(self._train[1]), self._generator(1)).to(self.device)

    def _generator(self, purpose: int) -> torch.Generator:
        seed = purpose * 2**52 + self.config.seed * 2**20 + self.epoch
        return torch.Generator().manual_seed(seed)

    def batch(self, index: Tensor, moves: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Training images (normalised) and labels of an index.

        Args:
            index: Which images.
            moves: How each image of the training set is augmented; None for not at all.
        """
        images = self._train[0][index]
        if moves is not None:
            images = move_images(images, moves[index])
        return self._normalise(images), self._train[1][index]

    def _step(self, batch: Tensor, moves: Tensor | None) -> None:
        index, weight = share(batch)
        images, labels = self.batch(index, moves)
        network = self._engine = self._engine or engine(self.model, self.optimizer)
        evaluations: list[tuple[Tensor, Tensor]] = []

        def closure() -> Any:
            self.optimizer.zero_grad()
            logits = network(images)
            loss = weight * F.cross_entropy(logits, labels)
            evaluations.append((loss.detach(), logits.detach()))
            penalty = self.method.penalty(self)
            if penalty is not None:
                loss = loss + penalty
            loss.backward()  # type: ignore[no-untyped-call]
            check_gradients(self.model, loss.detach())
            return loss

        self._lr = self._schedule.get_last_lr()[0]
        buffers = self._copy_of_buffers()
        try:
            self.optimizer.step(closure)
        except NonFiniteError as error:
            self._skip(error, buffers)
        else:
            # `bug` evaluates the closure more than once; the first time is before the step.
            loss, logits = evaluations[0]
            self._loss_sum += loss * len(batch) / process_count()
            self._correct += (logits.argmax(1) == labels).sum() * (weight > 0)
            self._seen += len(batch)
            self.skipped_in_a_row = 0
        self._schedule.step()
        self._batch += 1
        self.method.after_step(self)

    def _copy_of_buffers(self) -> list[Tensor]:
        """Running statistics, which a forward pass changes; none where no step is skipped."""
        return [b.clone() for b in self.model.buffers()] if self.config.skip_nonfinite else []

    def _skip(self, error: NonFiniteError, buffers: list[Tensor]) -> None:
        allowed = self.config.skip_nonfinite
        if self.skipped_in_a_row >= allowed:
            after = f" after {allowed} skipped ones" if allowed else ""
            raise NonFiniteError(
                f"step {self.step + 1} of {self.steps}{after}: {error}; expected finite numbers; "
                f"lower the learning rate (--lr, now {self.config.lr}), or skip such steps with "
                f"--skip-nonfinite (now {allowed})"
            ) from error
        for buffer, value in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(value)
        self.skipped_steps += 1
        self.skipped_in_a_row += 1

    def _end_epoch(self) -> EpochMetrics:
        self._loss_sum, self._correct = total(self._loss_sum), total(self._correct)
        loss, images = self.loss, self._seen
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"epoch {self.epoch + 1}: the loss is {loss}; expected a finite number; "
                f"lower the learning rate (--lr, now {self.config.lr})"
            )
        size, reached = self.size, self._accuracy()
        self._lap()
        validated = self._split == "validation"
        metrics = EpochMetrics(
            epoch=self.epoch + 1,
            loss=loss,
            train_accuracy=100 * int(self._correct) / images,
            test_accuracy=None if validated else reached,
            validation_accuracy=reached if validated else None,
            compression=size.compression,
            network_compression=size.network_compression,
            parameters=size.parameters if self.layers else size.network_parameters,
            ranks=self.ranks,
            lr=self._lr,
            seconds=self._seconds,
            skipped_steps=self.skipped_steps,
        )
        self.history.append(metrics)
        self.epoch += 1
        self._begin_epoch()
        return metrics

    def _accuracy(self) -> float:
        """Share of the images that are held out that the network gets right, in percent."""
        self.model.eval()
        take_buffers(self.model)
        reached = accuracy(lambda images: self.model(self._normalise(images)), *self._test)
        self.model.train()
        return reached

    def _normalise(self, images: Tensor) -> Tensor:
        # Made so from the start: images of one channel would count as laid out already.
        laid = torch.empty(
            images.shape, device=images.device, memory_format=torch.channels_last
        ).copy_(images)
        return laid.sub_(self._mean).div_(self._std)


def _schedule(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> LRScheduler:
    """Learning rates: up along a line for `warmup` steps, then down to 0 along a cosine."""
    if warmup == 0:
        return CosineAnnealingLR(optimizer, steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    return LambdaLR(optimizer, factor)
