"""Records the inputs and output shapes of a model's layers in one forward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdlrt.errors import UnsupportedLayerError
from tdlrt.paths.apply import is_channels_last

__all__ = ["LayerCall", "evaluating", "watch_calls", "zeros_for"]


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """One call of one layer.

    Attributes:
        input: The tensor that the layer was called with.
        output: Shape of the tensor that the layer returned.
    """

    input: Tensor
    output: tuple[int, ...]

    @property
    def channels_last(self) -> bool:
        """Whether the input is a batch of images with the channels last in memory."""
        return is_channels_last(self.input, self.input.ndim)


def zeros_for(model: nn.Module, input_size: Sequence[int]) -> Tensor:
    """Zeros of a given shape, with the type and device of the model's first parameter.

    Raises:
        TypeError: The shape is not a sequence of ints.
        ValueError: A size is negative, or there is too little memory.
    """
    if (
        isinstance(input_size, str | bytes)
        or not isinstance(input_size, Sequence)
        or any(not isinstance(size, Integral) or isinstance(size, bool) for size in input_size)
    ):
        raise TypeError(
            f"input_size: got {input_size!r}, expected a sequence of ints, the batch size first, "
            "such as (1, 3, 32, 32)"
        )
    first: Any = next(model.parameters(), torch.zeros(0))
    try:
        return torch.zeros(tuple(input_size), dtype=first.dtype, device=first.device)
    except (RuntimeError, TypeError) as error:  # TypeError: more than 64 bits
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"input_size: got {tuple(input_size)}, expected the shape of a batch ({reason})"
        ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and restore the training flag of every module afterwards."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, was in training.items():
            module.training = was


def watch_calls(
    model: nn.Module, layers: Collection[nn.Module], input: Tensor
) -> dict[nn.Module, list[LayerCall]]:
    """The calls of each layer in one forward pass in evaluation mode; an empty list if none.

    The model is not changed, nor are the statistics of its batch norms.

    Raises:
        UnsupportedLayerError: A layer has no shape yet, so that the pass would change the model.
    """
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise UnsupportedLayerError(
            f"model: {lazy[0]} has no shape yet, expected a model whose layers have one; run a "
            "batch through it first, model(batch)"
        )
    calls: dict[nn.Module, list[LayerCall]] = {layer: [] for layer in layers}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module].append(LayerCall(input=inputs[0], output=tuple(output.shape)))

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        with evaluating(model), torch.no_grad():
            model(input)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
