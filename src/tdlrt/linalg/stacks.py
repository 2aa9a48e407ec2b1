"""Stacks: Tucker tensors of different sizes along one leading dimension, padded with zeros."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Sequence

import torch
from torch import Tensor

__all__ = ["Layout", "cleared"]


class Layout:
    """True sizes of the Tucker tensors in a zero-padded stack.

    Member b has a core of shape ranks[b] and bases of shapes sizes[b][i] x ranks[b][i]. Zeros after
    the true entries fill them up to the shapes of the stack. Products preserve these zeros, but
    factorisations and functions that count entries need the true sizes.

    Args:
        sizes: (n_1, ..., n_d) of each member.
        ranks: (r_1, ..., r_d) of each member.
        modes: The modes that are factorised.
        device: Device of the stack.
        room: A layout whose stacks have the shape to use; by default the stacks are as small as the
            largest sizes and ranks permit.

    Attributes:
        rows: Rows of the bases in the stack.
        columns: Columns of the bases in the stack, the shape of its cores.
        moving: Modes in which the basis of a member can move, r_i < n_i.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        ranks: Sequence[Sequence[int]],
        modes: Collection[int],
        device: torch.device | str = "cpu",
        *,
        room: Layout | None = None,
    ) -> None:
        self.sizes = tuple(map(tuple, sizes))
        self.ranks = tuple(map(tuple, ranks))
        self.modes = tuple(modes)
        self.device = torch.device(device)
        rows, columns = (tuple(map(max, zip(*of, strict=True))) for of in (self.sizes, self.ranks))
        self.rows: tuple[int, ...] = room.rows if room else rows
        self.columns: tuple[int, ...] = room.columns if room else columns
        self.moving = tuple(i for i in self.modes if any(self._moves(i)))
        self._tensors: dict[Hashable, Tensor] = {}
        # Computed here, because a step that is being captured or compiled must only read them.
        self._padding = {mode: self._padding_of(mode) for mode in self.modes}
        self._moved = {mode: self._moves_of(mode) for mode in self.modes}

    def __len__(self) -> int:
        return len(self.ranks)

    def take(self, members: Sequence[int]) -> Layout:
        """The layout of some of the members, in stacks of the same shape."""
        sizes, ranks = ([of[b] for b in members] for of in (self.sizes, self.ranks))
        return Layout(sizes, ranks, self.modes, self.device, room=self)

    def padding(self, mode: int) -> Tensor | None:
        """1 for padded columns of a basis, else 0: B x r_i in float64; None without padding."""
        return self._padding[mode]

    def moves(self, mode: int) -> Tensor | None:
        """Which members move in a mode of `moving`: B booleans, or None if all members do."""
        return self._moved[mode]

    def rank_tensor(self) -> Tensor:
        """The ranks, B x d in int64."""
        return self._cached("ranks", lambda: torch.tensor(self.ranks))

    def spare(self, mode: int) -> Tensor:
        """n_i - r_i of each member, how many columns a basis can gain: B numbers in int64."""
        pairs = zip(self.sizes, self.ranks, strict=True)
        return self._cached(
            ("spare", mode), lambda: torch.tensor([n[mode] - r[mode] for n, r in pairs])
        )

    def entries(self) -> Tensor:
        """Number of true entries of each core, B numbers in float64."""
        counts = [float(math.prod(ranks)) for ranks in self.ranks]
        return self._cached("entries", lambda: torch.tensor(counts, dtype=torch.float64))

    def without_padding(self, core: Tensor) -> Tensor:
        """A stack of cores with zeros in the padding, whatever stood there."""
        if all(ranks == self.columns for ranks in self.ranks):
            return core
        return cleared(core, self.rank_tensor())

    def column_shares(self, mode: int, dtype: torch.dtype) -> Tensor:
        """1 / r_i for the true columns of a basis and 0 for padding: B x 1 x r_i."""

        def make() -> Tensor:
            ranks = torch.tensor([ranks[mode] for ranks in self.ranks])
            return (_valid(self.columns[mode], ranks) / ranks[:, None])[:, None, :].to(dtype)

        return self._cached(("column shares", mode, dtype), make)

    def row_shares(self, mode: int, dtype: torch.dtype) -> Tensor:
        """1 / prod_{j != i} r_j for true columns of Mat_i(C), else 0: B x 1 x prod_{j != i} r_j."""

        def make() -> Tensor:
            shares = torch.ones(len(self), 1, dtype=torch.float64)
            for other in range(len(self.columns)):
                if other != mode:
                    columns = self.column_shares(other, torch.float64).cpu()
                    shares = (shares[:, :, None] * columns).flatten(1)
            return shares[:, None, :].to(dtype)

        return self._cached(("row shares", mode, dtype), make)

    def shares(self, mode: int, target: Layout, dtype: torch.dtype) -> Tensor:
        """1 / r_i for true columns here and true rows in the target, else 0: B x r'_i x r_i."""

        def make() -> Tensor:
            rows = _valid(target.columns[mode], torch.tensor([r[mode] for r in target.ranks]))
            return rows[:, :, None].to(self.device, dtype) * self.column_shares(mode, dtype)

        return self._cached(("shares", mode, dtype), make) if target is self else make()

    def _cached(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._tensors:
            self._tensors[key] = make().to(self.device)
        return self._tensors[key]

    def _moves(self, mode: int) -> list[bool]:
        return [n[mode] > r[mode] for n, r in zip(self.sizes, self.ranks, strict=True)]

    def _padding_of(self, mode: int) -> Tensor | None:
        ranks = [ranks[mode] for ranks in self.ranks]
        if min(ranks) == self.columns[mode]:
            return None
        return (1 - _valid(self.columns[mode], torch.tensor(ranks))).to(self.device)

    def _moves_of(self, mode: int) -> Tensor | None:
        moves = self._moves(mode)
        return None if all(moves) else torch.tensor(moves, device=self.device)


def _valid(size: int, counts: Tensor) -> Tensor:
    """B x size: 1 in the first counts[b] places of row b, else 0, in float64."""
    return (torch.arange(size) < counts[:, None]).double()


def cleared(core: Tensor, ranks: Tensor) -> Tensor:
    """A stack of cores with zeros behind the true entries of each.

    Args:
        core: B x r_1 x ... x r_d.
        ranks: True ranks of each member, B x d.
    """
    for mode in range(core.ndim - 1):
        true = torch.arange(core.shape[1 + mode], device=core.device) < ranks[:, mode, None]
        shape = [1] * core.ndim
        shape[0], shape[1 + mode] = true.shape
        core = torch.where(true.view(shape), core, 0)
    return core
