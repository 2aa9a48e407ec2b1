"""Weights that others have written: bases are made orthonormal again, and W stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdlrt.errors import IntegratorStateError
from tdlrt.linalg import (
    Layout,
    mode_product,
    orthonormality_error,
    orthonormality_tolerance,
    positive_qr,
)

__all__ = ["Turned", "made_orthonormal", "not_orthonormal", "turn_gradients_"]

# A basis may be off by more than rounding explains, as an average of two is that hardly differ.
_SLACK = 10


class Turned(NamedTuple):
    """A layer whose parameters still have the bases that were written, unlike its stack.

    Attributes:
        turns: R_i by mode, U_i = U'_i R_i.
        parameters: The core and the bases as they were read.
    """

    turns: dict[int, Tensor]
    parameters: list[Tensor]


def not_orthonormal(bases: Mapping[int, Tensor], layout: Layout) -> dict[int, Sequence[int]]:
    """Places of a stack at which a basis is not orthonormal; waits for the device.

    Args:
        bases: U_i by mode, B x n_i x r_i.
        layout: The true sizes.

    Returns:
        The modes of these bases by place. What is not finite is left out.
    """
    if not bases:
        return {}
    found = [orthonormality_error(basis, layout.padding(mode)) for mode, basis in bases.items()]
    errors = torch.stack(found, dim=1).nan_to_num(0.0, 0.0, 0.0).tolist()
    wrong: dict[int, Sequence[int]] = {}
    for place, (sizes, own) in enumerate(zip(layout.sizes, errors, strict=True)):
        modes = [
            mode
            for mode, error in zip(bases, own, strict=True)
            if error > _SLACK * orthonormality_tolerance(bases[mode].dtype, sizes[mode])
        ]
        if modes:
            wrong[place] = modes
    return wrong


def made_orthonormal(
    core: Tensor, bases: Mapping[int, Tensor]
) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """A layer with orthonormal bases and the same W = C x_i U_i = (C x_i R_i) x_i U'_i.

    Args:
        core: C.
        bases: U_i by mode, n_i x r_i.

    Returns:
        C x_i R_i, U'_i by mode, and R_i by mode, U_i = U'_i R_i.
    """
    orthonormal, turns = {}, {}
    for mode, basis in bases.items():
        orthonormal[mode], turns[mode] = positive_qr(basis)
        core = mode_product(core[None], turns[mode][None], mode)[0]
    return core, orthonormal, turns


def turn_gradients_(
    name: str, core: Tensor, bases: Mapping[int, Tensor], turns: Mapping[int, Tensor]
) -> None:
    """Gradients at C' = C x_i R_i and U'_i = U_i R_i^-1 from those at C and U_i, in place.

    grad_{C'} L = grad_C L x_i R_i^-T and grad_{U'_i} L = grad_{U_i} L R_i^T.

    Args:
        name: Name of the layer.
        core: grad_C L.
        bases: grad_{U_i} L by mode.
        turns: R_i by mode.

    Raises:
        IntegratorStateError: The columns of U_i are dependent, so that R_i has no inverse.
    """
    turned = core
    for mode, turn in turns.items():
        lengths = torch.linalg.vector_norm(turn, dim=0)  # those of the columns of U_i
        if not (turn.diagonal() > 8 * torch.finfo(turn.dtype).eps * lengths).all():
            raise IntegratorStateError(
                f"{name}.factors.{mode}: got a basis that was written from outside and has "
                "dependent columns, expected independent ones; restore it, or factorise the layer "
                "anew"
            )
        identity = torch.eye(len(turn), dtype=turn.dtype, device=turn.device)
        inverse = torch.linalg.solve_triangular(turn, identity, upper=True)
        turned = mode_product(turned[None], inverse.mT[None], mode)[0]
        bases[mode].copy_(bases[mode] @ turn.mT)
    core.copy_(turned)
