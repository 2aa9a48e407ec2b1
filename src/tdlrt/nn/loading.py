"""Checks of the state_dict of a Tucker layer, made before the layer changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from tdlrt.errors import RankError, StateDictError
from tdlrt.nn.factors import check_shapes

__all__ = ["check_bias", "stored_weight"]


def stored_weight(
    state_dict: Mapping[str, Any],
    prefix: str,
    kind: str,
    shape: Sequence[int],
    learned: Collection[int],
) -> list[Tensor]:
    """Core and factors of a layer in a state_dict, of any ranks; empty if both are missing.

    Args:
        state_dict: The state_dict of the whole model.
        prefix: Name of the layer in the state_dict, with the final dot.
        kind: Name of the layer's class.
        shape: Shape of the layer's weight.
        learned: Modes that the layer factorises.

    Raises:
        StateDictError: Some of the tensors are missing, the tensors do not fit the layer, or the
            weight is dense.
    """
    expected = [f"{prefix}core", *(f"{prefix}factors.{mode}" for mode in range(len(shape)))]
    present = [key for key in expected if isinstance(state_dict.get(key), Tensor)]
    if not present and f"{prefix}weight" in state_dict:
        raise StateDictError(
            f"{prefix}weight: got a dense weight for a {kind}; load it into the dense model and "
            "factorise the model afterwards (tdlrt.factorize_)"
        )
    if 0 < len(present) < len(expected):
        missing = ", ".join(key for key in expected if key not in present)
        raise StateDictError(
            f"{missing}: missing, while {present[0]} is present; expected the core and all "
            f"{len(shape)} factors of a {kind}"
        )
    tensors = [state_dict[key] for key in present]
    try:
        if tensors:
            check_shapes(shape, learned, tensors[0], tensors[1:])
    except RankError as error:
        raise StateDictError(
            f"{prefix.rstrip('.') or 'layer'}: the state_dict does not fit a {kind} with a weight "
            f"of shape {tuple(shape)}: {error}"
        ) from error
    return tensors


def check_bias(incoming: object, own: Tensor | None, prefix: str) -> None:
    """Refuse a bias that torch would refuse only after core and factors have changed.

    Raises:
        StateDictError: The shape is not that of the layer's own bias.
    """
    expected = None if own is None else tuple(own.shape)
    got = tuple(incoming.shape) if isinstance(incoming, Tensor) else None
    if got is not None and got != expected:
        raise StateDictError(
            f"{prefix}bias: got one of shape {got}, expected "
            f"{'none' if expected is None else f'shape {expected}'}; it belongs to another layer"
        )
