"""Lightning: a callback that logs ranks, clips gradients and freezes ranks."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from tdlrt.errors import SetupError
from tdlrt.extras import needs_extra
from tdlrt.integrations.control import RankControl, unwrap_optimizer
from tdlrt.optim import TDLRT
from tdlrt.report import metrics

with needs_extra("lightning", "tdlrt.integrations.lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer, callbacks

__all__ = ["TDLRTCallback"]


class TDLRTCallback(Callback):
    """Logs `tdlrt.metrics` every `log_every_n_steps`, clips gradients and freezes ranks.

    `configure_optimizers` has to return the TDLRT, alone or with schedulers. Lightning passes a
    closure to it, so `bug` takes a whole step on one batch.

    Args:
        max_grad_norm: Clip by the norm of the projected gradient (see `TDLRT.clip_grad_norm_`).
        freeze_at_epoch: Freeze ranks after this number of epochs. For a number of steps, use
            TDLRT(..., freeze_after=steps).
        freeze_at_share: Freeze ranks after this share of all steps, in [0, 1].

    Raises:
        SetupError: An argument is out of range. At the start of `fit`: the Trainer is set up in a
            way that gives wrong results with Tucker layers.
    """

    def __init__(
        self,
        *,
        max_grad_norm: float | None = None,
        freeze_at_epoch: float | None = None,
        freeze_at_share: float | None = None,
    ) -> None:
        self._control = RankControl(
            max_grad_norm=max_grad_norm,
            freeze_at_epoch=freeze_at_epoch,
            freeze_at_share=freeze_at_share,
        )
        self._steps = math.inf

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse options that would silently give wrong results."""
        optimizers = _optimizers(trainer)
        _check_averaging(trainer)
        _check_clipping(trainer, pl_module)
        _check_accumulation(trainer, pl_module, optimizers)
        self._steps = trainer.estimated_stepping_batches
        if self._control.freeze_at_share is not None and math.isinf(self._steps):
            raise SetupError(
                "freeze_at_share: got one for a training without an end, expected max_epochs or "
                "max_steps in the Trainer; or use freeze_at_epoch"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze the ranks if they are to be frozen from the start."""
        self._freeze_if_due(trainer, float(trainer.current_epoch))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Clip the gradients; with `bug`, at every evaluation of the closure."""
        inner = unwrap_optimizer(optimizer)
        if inner is not None:
            self._control.clip(inner)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Freeze the ranks when it is time, and log the metrics."""
        epochs = trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches
        self._freeze_if_due(trainer, epochs)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            # Not by log_dict, which would turn every number into a tensor on the device.
            for logger in trainer.loggers:
                logger.log_metrics(metrics(pl_module), step=trainer.global_step - 1)

    def _freeze_if_due(self, trainer: Trainer, epochs: float) -> None:
        share = trainer.global_step / self._steps
        for optimizer in _optimizers(trainer):
            self._control.freeze_if_due(optimizer, epochs=epochs, share=share)


def _optimizers(trainer: Trainer) -> list[TDLRT]:
    found = [unwrap_optimizer(optimizer) for optimizer in trainer.optimizers]
    optimizers = [optimizer for optimizer in found if optimizer is not None]
    if not optimizers:
        got = [type(optimizer).__name__ for optimizer in trainer.optimizers]
        raise SetupError(
            f"optimizers: got {got}, expected a TDLRT; return one from configure_optimizers"
        )
    return optimizers


def _check_averaging(trainer: Trainer) -> None:
    swa = callbacks.StochasticWeightAveraging
    averages = (
        swa,
        getattr(callbacks, "WeightAveraging", swa),
    )  # WeightAveraging: since Lightning 2.6
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, averages):
            raise SetupError(
                f"callbacks: got {type(callback).__name__}, which would average factors, "
                "which does not average the weights; average tdlrt.to_dense(model) instead"
            )


def _check_clipping(trainer: Trainer, module: LightningModule) -> None:
    own = type(module).configure_gradient_clipping
    if trainer.gradient_clip_val and own is LightningModule.configure_gradient_clipping:
        raise SetupError(
            f"gradient_clip_val: got {trainer.gradient_clip_val}, which measures gradients of "
            "factors, expected none; leave it out and clip by the projected gradient with "
            "TDLRTCallback(max_grad_norm=...)"
        )


def _check_accumulation(trainer: Trainer, module: LightningModule, optimizers: list[TDLRT]) -> None:
    several = trainer.accumulate_grad_batches > 1 and module.automatic_optimization
    if several and any(optimizer.integrator == "bug" for optimizer in optimizers):
        raise SetupError(
            f"accumulate_grad_batches: got {trainer.accumulate_grad_batches} with "
            "integrator='bug', which evaluates the last batch again and has no access to the "
            "batches before it; use integrator='parallel', or larger batches"
        )
