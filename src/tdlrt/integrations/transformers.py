"""Hugging Face Trainer: a callback that logs ranks, clips gradients and freezes ranks."""

from __future__ import annotations

from typing import Any

from tdlrt.errors import SetupError
from tdlrt.extras import needs_extra
from tdlrt.integrations.control import RankControl, unwrap_optimizer
from tdlrt.report import metrics

with needs_extra("hf", "tdlrt.integrations.transformers"):
    from transformers import (
        PrinterCallback,
        ProgressCallback,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

__all__ = ["TDLRTCallback"]


class TDLRTCallback(TrainerCallback):
    """Logs `tdlrt.metrics` with every training loss, clips gradients and freezes ranks.

    Pass the optimiser to the Trainer, Trainer(..., optimizers=(TDLRT(...), scheduler)), and then
    call trainer.add_callback(TDLRTCallback(trainer)).

    Args:
        trainer: The Trainer, with a TDLRT as its optimiser and max_grad_norm=0.0 in its arguments.
            The Trainer's own clipping, on by default, measures gradients of factors, which scale
            with the core.
        max_grad_norm: Clip by the norm of the projected gradient (see `TDLRT.clip_grad_norm_`).
        freeze_at_epoch: Freeze ranks after this number of epochs. For a number of steps, use
            TDLRT(..., freeze_after=steps).
        freeze_at_share: Freeze ranks after this share of all steps, in [0, 1].

    Raises:
        SetupError: An argument is out of range, or the Trainer is not as described.
    """

    def __init__(
        self,
        trainer: Trainer,
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
        optimizer = unwrap_optimizer(trainer.optimizer)
        if optimizer is None:
            raise SetupError(
                f"trainer: got one whose optimizer is {type(trainer.optimizer).__name__}, expected "
                "TDLRT; pass Trainer(..., optimizers=(TDLRT(model, ...), None))"
            )
        if trainer.args.max_grad_norm:
            raise SetupError(
                f"max_grad_norm: got TrainingArguments(max_grad_norm={trainer.args.max_grad_norm}) "
                "(1.0 is its default), which measures gradients of factors, expected 0.0; set it, "
                "and clip by the projected gradient with TDLRTCallback(trainer, max_grad_norm=...)"
            )
        self._trainer = trainer
        self._optimizer = optimizer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze the ranks if they are to be frozen from the start."""
        self._freeze_if_due(state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clip the gradients."""
        self._control.clip(self._optimizer)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze the ranks when it is time."""
        self._freeze_if_due(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics to the log entry of a training loss, and pass them to other callbacks.

        The other callbacks run before this one, so they have to be called again. Those that print
        to the console are not: a rank per layer and mode would hide the loss.
        """
        if not logs or "loss" not in logs:
            return
        scalars = metrics(kwargs["model"])
        state.log_history[-1].update(scalars)
        for callback in self._trainer.callback_handler.callbacks:
            if not isinstance(callback, TDLRTCallback | PrinterCallback | ProgressCallback):
                callback.on_log(args, state, control, logs=dict(scalars), **kwargs)

    def _freeze_if_due(self, state: TrainerState) -> None:
        share = state.global_step / max(1, state.max_steps)
        self._control.freeze_if_due(self._optimizer, epochs=state.epoch or 0.0, share=share)
