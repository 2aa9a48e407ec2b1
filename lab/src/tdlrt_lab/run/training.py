"""The training loop, which can stop after any step, be saved, and continue exactly."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdlrt.errors import NonFiniteError
from tdlrt.nn import TuckerLayer
from tdlrt.optim.threads import threads_for
from tdlrt.report import ModelSummary, summary
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import Data
from tdlrt_lab.methods import METHODS
from tdlrt_lab.methods.sizes import Size, kept_parameters
from tdlrt_lab.models import build_model
from tdlrt_lab.run.accuracy import Quality, quality
from tdlrt_lab.run.batches import make_batches
from tdlrt_lab.run.epoch_totals import EpochTotals
from tdlrt_lab.run.finite import check_gradients
from tdlrt_lab.run.metrics import EpochMetrics
from tdlrt_lab.run.processes import broadcast_buffers, distribute, process_count, share
from tdlrt_lab.run.rank_changes import RankRecorder
from tdlrt_lab.run.schedule import cosine_schedule
from tdlrt_lab.run.stored_optimizer import check_optimizer, checked_schedule

__all__ = ["Training"]


class Training:
    """Model, optimiser and learning-rate schedule of a run, and its position in the data.

    The order of the examples depends on seed and epoch alone, and everything else that the next
    step depends on is in `state_dict`. A restored training therefore reaches the same weights as an
    uninterrupted one, bit for bit on a CPU.

    Attributes:
        config: Options of the run.
        method: How the network is trained and compressed.
        model: The network, on its device.
        layers: The layers that the method compresses, with the size of their dense weights.
        optimizer: The optimiser of all parameters.
        batches: The training images, or windows of text.
        classes: Number of classes.
        epoch: Number of finished epochs.
        history: Metrics of the finished epochs.
        skipped_steps: Steps so far that were skipped because of a NaN or infinite value.
        skipped_in_a_row: Skipped steps since the last step that was not.
    """

    def __init__(self, config: RunConfig, data: Data) -> None:
        self.config = config
        self.device = config.torch_device()
        self.method = METHODS[config.method]
        self.classes = len(data.classes)
        self.input_size = (1, *data.input_shape)
        self.model = build_model(config.model, data.input_shape, self.classes)
        self.dense_macs = summary(self.model, input_size=self.input_size).macs
        # The backward pass counts twice. Unknown multiply-adds count as many.
        self._step_macs = 3 * config.batch_size * (self.dense_macs or math.inf)
        self._network_dense_parameters = kept_parameters(self.model)
        self.layers = self.method.prepare(self.model, config)
        self.model.to(self.device)
        self._use_channels_last()
        self.batches = make_batches(config, data, self.device)
        self._split = data.split
        self._is_text = len(data.input_shape) == 1
        inputs, labels = data.held_out()
        self._held_out = inputs.to(self.device), labels.to(self.device)
        self._labels_each = labels[0].numel()
        self.steps_per_epoch = math.ceil(len(self.batches) / config.batch_size)
        self.steps = config.epochs * self.steps_per_epoch
        self.dense_steps = max(1, round(config.dense_until * self.steps))
        self.optimizer = self.method.optimizer(self.model, config, self.steps)
        self._autocast = config.precision == "bfloat16"
        self._distributed: nn.Module | None = None
        self._warmup = min(round(config.warmup * self.steps), self.steps - 1)
        self._schedule = cosine_schedule(self.optimizer, self._warmup, self.steps)
        self.epoch: int = 0
        self._batch: int = 0
        self._lr = 0.0
        self._totals = EpochTotals(self.device)
        self.history: list[EpochMetrics] = []
        self.skipped_steps = self.skipped_in_a_row = 0
        self.method.begin(self)
        self._recorder = RankRecorder()
        self._record_ranks()

    @property
    def step(self) -> int:
        """Number of steps so far."""
        return self.epoch * self.steps_per_epoch + self._batch

    @property
    def finished(self) -> bool:
        """Whether all epochs are finished."""
        return self.epoch == self.config.epochs

    @property
    def ranks(self) -> dict[str, list[int]]:
        """Ranks of each Tucker layer."""
        layers = self.model.named_modules()
        return {name: list(m.ranks) for name, m in layers if isinstance(m, TuckerLayer)}

    @property
    def loss(self) -> float:
        """Mean loss of the current epoch so far; NaN if all steps were skipped."""
        return self._totals.mean_loss

    @property
    def size(self) -> Size:
        """Number of parameters now, and in the dense network."""
        layers = [self.model.get_submodule(name) for name in self.layers]
        return Size(
            sum(kept_parameters(layer, biases=False) for layer in layers),
            sum(self.layers.values()),
            kept_parameters(self.model),
            self._network_dense_parameters,
        )

    def summary(self) -> ModelSummary:
        """Ranks, parameters, and multiply-adds for one example, of each layer."""
        return summary(self.model, input_size=self.input_size)

    def rebuild(self) -> None:
        """Create a new optimiser after parameters were replaced, and continue the schedule."""
        self._distributed = None
        rate, schedule = self.optimizer.param_groups[0]["lr"], self._schedule.state_dict()
        self._use_channels_last()
        self.optimizer = self.method.optimizer(self.model, self.config, self.steps)
        self._schedule = cosine_schedule(self.optimizer, self._warmup, self.steps)
        self._schedule.load_state_dict(schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _use_channels_last(self) -> None:
        # Twice as fast on a CPU. Not for Tucker cores: a change of rank would undo it.
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def epochs(
        self, stop_requested: Callable[[], bool], after_step: Callable[["Training"], None]
    ) -> Iterator[EpochMetrics]:
        """Train to the end or until a stop is requested, and yield the metrics of each epoch.

        Args:
            stop_requested: Called before every step; true stops the training.
            after_step: Called after every step.

        Raises:
            NonFiniteError: More than `skip_nonfinite` steps in a row had a loss, gradient or weight
                that is NaN or infinite (none of them changed a weight), or the mean loss
                of an epoch is not finite.
        """
        while not self.finished:
            self._totals.start_clock()
            order, moves = self.batches.order(self.epoch), self.batches.moves(self.epoch)
            while self._batch < self.steps_per_epoch:
                if stop_requested():
                    return
                start = self._batch * self.config.batch_size
                index = order[start : start + self.config.batch_size]
                self._step(index, moves)
                self._totals.lap()
                after_step(self)
            yield self._end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on, as tensors and plain types.

        Every process must call it.
        """
        cuda = self.device.type == "cuda"
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "epoch": self.epoch,
            "batch": self._batch,
            "lr": self._lr,
            **self._totals.state_dict(),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "rng": torch.get_rng_state(),
            "rng_device": torch.cuda.get_rng_state(self.device) if cuda else None,
            "history": [asdict(metrics) for metrics in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self.method.restore(self, state["model"])
        self.model.load_state_dict(state["model"])
        step = state["epoch"] * self.steps_per_epoch + state["batch"]
        check_optimizer(state["optimizer"], self.optimizer, self.model)
        schedule = checked_schedule(state["schedule"], self._schedule, step)
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(schedule)
        self.epoch, self._batch = state["epoch"], state["batch"]
        self._lr = state["lr"]
        # Earlier versions had no skipped steps and recorded no changes of ranks.
        seen = min(self._batch * self.config.batch_size, len(self.batches)) * self._labels_each
        self._totals.load_state_dict({"seen": seen, "rank_changes": [], **state})
        self.skipped_steps = state.get("skipped_steps", 0)
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self.history = [EpochMetrics(**metrics) for metrics in state["history"]]
        epochs = [*(metrics.rank_changes for metrics in self.history), self._totals.rank_changes]
        self._recorder.restore(self.ranks, itertools.chain.from_iterable(epochs))
        torch.set_rng_state(state["rng"].cpu())
        if state["rng_device"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_device"].cpu(), self.device)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """The first training examples of this epoch, with `count` labels, and these labels."""
        examples = math.ceil(count / self._labels_each)
        return self.batches.batch(self.batches.order(self.epoch)[:examples])

    def _step(self, batch: Tensor, moves: Tensor | None) -> None:
        index, weight = share(batch)
        inputs, labels = self.batches.batch(index, moves)
        if self._distributed is None:
            self._distributed = distribute(self.model, self.optimizer)
        network = self._distributed
        evaluations: list[tuple[Tensor, Tensor]] = []

        def closure() -> Any:
            self.optimizer.zero_grad()
            with self._rounded(self._autocast):
                logits = network(inputs)
                loss = weight * F.cross_entropy(logits, labels)
            evaluations.append((loss.detach(), logits.detach()))
            penalty = self.method.penalty(self)
            if penalty is not None:
                loss = loss + penalty
            loss.backward()  # type: ignore[no-untyped-call]
            check_gradients(self.model, loss.detach())
            return loss

        self._lr = float(self._schedule.get_last_lr()[0])
        # A forward pass changes buffers such as running statistics; a skipped step restores them.
        buffers = [b.clone() for b in self.model.buffers()] if self.config.skip_nonfinite else []
        try:
            with threads_for(self._step_macs):
                self.optimizer.step(closure)
        except NonFiniteError as error:
            self._skip(error, buffers)
        else:
            # The integrator 'bug' evaluates the closure more than once, first before the step.
            loss, logits = evaluations[0]
            correct = (logits.argmax(1) == labels).sum() * (weight > 0)
            count = len(batch) * self._labels_each
            self._totals.add(loss * count / process_count(), correct, count)
            self.skipped_in_a_row = 0
        self._schedule.step()
        self._batch += 1
        self.method.after_step(self)
        self._record_ranks()

    def _rounded(self, rounded: bool) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, rounded)

    def _record_ranks(self) -> None:
        self._totals.rank_changes += self._recorder.changes(self.step, self.ranks)

    def _skip(self, error: NonFiniteError, buffers: list[Tensor]) -> None:
        """Count a skipped step and restore the buffers, or raise if too many were skipped."""
        allowed = self.config.skip_nonfinite
        if self.skipped_in_a_row >= allowed:
            after = f" after {allowed} skipped steps" if allowed else ""
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
        self._totals.sum_over_processes()
        loss = self.loss
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"epoch {self.epoch + 1}: the loss is {loss}; expected a finite number; "
                f"lower the learning rate (--lr, now {self.config.lr})"
            )
        size, (percentage, held_out_loss) = self.size, self._evaluate()
        self._totals.lap()
        is_validation = self._split == "validation"
        metrics = EpochMetrics(
            epoch=self.epoch + 1,
            loss=loss,
            train_accuracy=self._totals.train_accuracy,
            test_accuracy=None if is_validation else percentage,
            validation_accuracy=percentage if is_validation else None,
            compression=size.compression,
            network_compression=size.network_compression,
            parameters=size.parameters if self.layers else size.network_parameters,
            ranks=self.ranks,
            lr=self._lr,
            seconds=self._totals.seconds,
            skipped_steps=self.skipped_steps,
            bits_per_character=held_out_loss / math.log(2) if self._is_text else None,
            steps=(self.epoch + 1) * self.steps_per_epoch,
            rank_changes=self._totals.rank_changes,
        )
        self.history.append(metrics)
        self.epoch, self._batch, self._lr = self.epoch + 1, 0, 0.0
        self._totals = EpochTotals(self.device)
        return metrics

    def _evaluate(self) -> Quality:
        """Accuracy and loss on the test or validation set."""
        self.model.eval()
        broadcast_buffers(self.model)
        normalise = self.batches.normalise
        # The last epoch's accuracy is that of the weights as they are stored.
        is_last = self.epoch + 1 == self.config.epochs
        with self._rounded(self._autocast and not is_last):
            found = quality(lambda inputs: self.model(normalise(inputs)), *self._held_out)
        self.model.train()
        return found
