"""The bases of a Tucker layer, and the check that a core and bases fit together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor, nn

from tdlrt.errors import RankError
from tdlrt.text_tables import format_shape

__all__ = ["FactorList", "check_shapes"]


class FactorList(nn.Module):
    """The bases of a Tucker layer, one per mode.

    A learned basis is a Parameter. The basis of a mode that is not factorised is the identity, a
    buffer: it moves with the model to another device but is neither trained nor counted.
    """

    def __init__(self, factors: Sequence[Tensor], learned: Collection[int]) -> None:
        super().__init__()
        for mode, factor in enumerate(factors):
            if mode in learned:
                self.register_parameter(str(mode), nn.Parameter(factor))
            else:
                self.register_buffer(str(mode), factor)

    def __len__(self) -> int:
        return len(self._parameters) + len(self._buffers)

    def __getitem__(self, mode: int) -> Tensor:
        if not -len(self) <= mode < len(self):
            raise IndexError(f"mode: got {mode}, expected an int from 0 to {len(self) - 1}")
        factor: Tensor = getattr(self, str(mode % len(self)))
        return factor

    def __iter__(self) -> Iterator[Tensor]:
        return (self[mode] for mode in range(len(self)))

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """The bases, each with its name for messages."""
        return ((f"factors[{mode}]", self[mode]) for mode in range(len(self)))

    def extra_repr(self) -> str:
        """Shapes of the bases."""
        return ", ".join(format_shape(factor.shape) for factor in self)


def check_shapes(
    shape: Sequence[int], learned: Collection[int], core: Tensor, factors: Sequence[Tensor]
) -> None:
    """Verify that a core and bases form a weight of a given shape.

    Args:
        shape: Shape (n_1, ..., n_d) of the weight.
        learned: Modes that are factorised; the others keep their full rank.
        core: C, of shape r_1 x ... x r_d.
        factors: U_i, of shape n_i x r_i.

    Raises:
        RankError: The shapes do not fit together.
    """
    expected = tuple(zip(shape, core.shape, strict=False))
    got = tuple(tuple(factor.shape) for factor in factors)
    if core.ndim != len(shape) or got != expected:
        raise RankError(
            f"core of shape {tuple(core.shape)} with factors of shapes {got}: expected a core of "
            f"{len(shape)} modes and factors of shapes (n_i, r_i) for n = {tuple(shape)}"
        )
    for mode, (size, rank) in enumerate(expected):
        if mode not in learned and rank != size:
            raise RankError(
                f"mode {mode}: got rank {rank}, expected {size}, because the layer does not "
                "factorise this mode; build the layer with modes='all'"
            )
