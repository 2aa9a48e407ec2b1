"""Refusing numbers that are NaN or infinite, in a step and in what is stored."""

import torch
from torch import Tensor, nn

from tdlrt.errors import NonFiniteError
from tdlrt_lab.run.processes import total

__all__ = ["check_gradients", "check_state"]


def check_gradients(model: nn.Module, loss: Tensor) -> None:
    """Refuse a step before the optimiser takes it.

    Of several processes, which have the same gradients by now but losses of their own, each must
    call it, and all of them refuse alike.

    Raises:
        NonFiniteError: The loss or a gradient is NaN or infinite.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if total(_not_finite([loss, *gradients]).any().float()) > 0:
        raise NonFiniteError(f"the loss ({float(loss)}) or a gradient is NaN or infinite")


def check_state(model: nn.Module) -> None:
    """Refuse a network that is not worth storing.

    Raises:
        NonFiniteError: A weight or a running statistic is NaN or infinite.
    """
    state = model.state_dict()
    found = _not_finite(list(state.values())).tolist()
    bad = [name for name, is_bad in zip(state, found, strict=True) if is_bad]
    if bad:
        raise NonFiniteError(f"NaN or infinite values in {', '.join(bad[:3])}; lower --lr")


def _not_finite(values: list[Tensor]) -> Tensor:
    """Whether each holds a NaN or an infinity, in one tensor, which waits for the GPU once."""
    return torch.stack([~value.isfinite().all() for value in values])
