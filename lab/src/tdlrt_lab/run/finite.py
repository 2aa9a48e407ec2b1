"""Checks for NaN and infinite values, before a step and before a checkpoint."""

import torch
from torch import Tensor, nn

from tdlrt.errors import NonFiniteError
from tdlrt_lab.run.processes import total

__all__ = ["check_gradients", "check_state"]


def check_gradients(model: nn.Module, loss: Tensor) -> None:
    """Check the loss and the gradients before the optimiser uses them.

    Every process must call it; if the loss of one is not finite, all of them raise.

    Raises:
        NonFiniteError: The loss or a gradient is NaN or infinite.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if total(_not_finite([loss, *gradients]).any().float()) > 0:
        raise NonFiniteError(f"the loss ({float(loss)}) or a gradient is NaN or infinite")


def check_state(model: nn.Module) -> None:
    """Check the weights before they are stored.

    Raises:
        NonFiniteError: A weight or a running statistic is NaN or infinite.
    """
    state = model.state_dict()
    found = _not_finite(list(state.values())).tolist()
    bad = [name for name, is_bad in zip(state, found, strict=True) if is_bad]
    if bad:
        raise NonFiniteError(f"NaN or infinite values in {', '.join(bad[:3])}; lower --lr")


def _not_finite(values: list[Tensor]) -> Tensor:
    """Whether each tensor has a NaN or infinite value; one tensor, to synchronise only once."""
    return torch.stack([~value.isfinite().all() for value in values])
