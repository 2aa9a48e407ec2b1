"""Tensors that consist of others, such as a state of 8 bits with its scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["copies_by_id", "parts"]


def parts(value: object) -> list[Tensor]:
    """The ordinary tensors of which a tensor consists: it alone, if it is one; else none."""
    if not isinstance(value, Tensor):
        return []
    if is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        return [part for name in names for part in parts(getattr(value, name))]
    return [value]


def copies_by_id(states: Iterable[object]) -> dict[int, Tensor]:
    """Copies of the composed tensors of an optimiser's state, by the id of the original.

    As the memo of `copy.deepcopy` they let it copy states whose class does not implement `clone`,
    which is what it calls.

    Args:
        states: What the optimiser keeps for each parameter.
    """
    values = [v for state in states if isinstance(state, Mapping) for v in state.values()]
    return {
        id(value): _copied(value)
        for value in values
        if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value)
    }


def _copied(tensor: Tensor) -> Tensor:
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.detach().clone()
    names, context = tensor.__tensor_flatten__()
    inner = {name: _copied(getattr(tensor, name)) for name in names}
    copied: Tensor = type(tensor).__tensor_unflatten__(
        inner, context, tensor.size(), tensor.stride()
    )
    return copied
