"""The ranks of all layers of a step: what the policy is asked, and its answer as truncations."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from tdlrt.linalg import (
    Cutoff,
    Layout,
    Truncation,
    possible_ranks,
    relative_spectrum,
    truncate_stack,
)
from tdlrt.optim.finite import Finite, Given
from tdlrt.optim.members import Members
from tdlrt.optim.steps import Augmented, Lifted
from tdlrt.ranks import Candidate, RankPolicy

__all__ = ["Examined", "Moved", "examine"]

Moved: TypeAlias = Sequence[tuple[Members, Augmented | Lifted]]
"""Layers after a step, with their weights and state in augmented bases."""


class Examined(NamedTuple):
    """Layers after a step, with the ranks that they are to keep.

    Attributes:
        members: The layers.
        step: Their weights and state in augmented bases.
        truncation: How the cores are cut.
        layout: The true sizes afterwards.
    """

    members: Members
    step: Augmented | Lifted
    truncation: Truncation
    layout: Layout


def examine(
    policy: RankPolicy,
    number: int,
    candidates: Mapping[str, Candidate],
    steps: Moved,
    curvatures: Sequence[Tensor],
    finite: Finite,
    given: Given,
) -> list[Examined]:
    """Choose the ranks of all layers of a step, with one transfer to the host.

    Args:
        policy: The policy of the step.
        number: Number of the step, from 1.
        candidates: All layers by name, without spectra, norms and curvatures.
        steps: Those that have moved.
        curvatures: Mean squares of their gradients, this step's included.
        finite: Refuses results that are not finite.
        given: See `Finite.given`.

    Raises:
        NonFiniteError: As `finite` says; nothing was changed.
    """
    sizes = [members.sizes_after(step) for members, step in steps]
    available: list[Sequence[Sequence[int]]] = []
    if policy.needs_spectra:
        candidates, available = _with_spectra(candidates, steps, curvatures, finite, given, sizes)
    else:
        candidates = {name: of for name, of in candidates.items() if not of.resting}
    cutoffs = policy.cutoffs(candidates, number)
    own = [[cutoffs[slot.name] for slot in members.slots] for members, _ in steps]
    truncations = [
        truncate_stack(step.core, step.ranks, cuts, members.layout.modes)
        for (members, step), cuts in zip(steps, own, strict=True)
    ]
    if available and all(cut.tau == 0 for cuts in own for cut in cuts):
        kept = [
            [_explicit(cut, of, members.layout.modes) for cut, of in zip(cuts, ranks, strict=True)]
            for (members, _), cuts, ranks in zip(steps, own, available, strict=True)
        ]
    else:
        read = finite.check(given, sizes, [t.ranks for t in truncations])
        kept = [_ranks(numbers, len(cuts)) for numbers, cuts in zip(read, own, strict=True)]
    return [
        _fitting(members, step, truncation, ranks)
        for (members, step), truncation, ranks in zip(steps, truncations, kept, strict=True)
    ]


def _with_spectra(
    candidates: Mapping[str, Candidate],
    steps: Moved,
    curvatures: Sequence[Tensor],
    finite: Finite,
    given: Given,
    sizes: Sequence[Tensor],
) -> tuple[dict[str, Candidate], list[Sequence[Sequence[int]]]]:
    """Bring singular values, norms, curvatures and ranks of the moved layers to the host."""
    wanted, decided = [], []
    for (members, step), curvature in zip(steps, curvatures, strict=True):
        modes = members.layout.modes
        decided.append(modes[:1] if _is_matrix(members.layout) else modes)
        spectra = [relative_spectrum(step.core, mode) for mode in decided[-1]]
        wanted += [step.ranks, _core_norms(step.core), curvature, *spectra]
    numbers = iter(finite.check(given, sizes, wanted))
    found = dict(candidates)
    available: list[Sequence[Sequence[int]]] = []
    for (members, _), modes in zip(steps, decided, strict=True):
        count = len(members.places)
        ranks, norms, curves = _ranks(next(numbers), count), next(numbers), next(numbers)
        tables = {mode: _rows(next(numbers), count) for mode in modes}
        for n, slot in enumerate(members.slots):
            found[slot.name] = found[slot.name]._replace(
                available=ranks[n],
                squared_norm=norms[n] ** 2,
                spectra={
                    mode: tables[mode if mode in tables else modes[0]][n][: ranks[n][mode]]
                    for mode in members.layout.modes
                },
                curvature=None if math.isnan(curves[n]) else curves[n],
            )
        available.append(ranks)
    return found, available


def _core_norms(core: Tensor) -> Tensor:
    """||C|| of each member of a stack, B numbers in float64."""
    norms: Tensor = torch.linalg.vector_norm(core.flatten(1), dim=1, dtype=torch.float64)
    return norms


def _is_matrix(layout: Layout) -> bool:
    return len(layout.columns) == 2 and len(layout.modes) == 2


def _explicit(cutoff: Cutoff, available: Sequence[int], modes: Collection[int]) -> tuple[int, ...]:
    """Ranks that a cut-off without a tolerance keeps."""
    kept = [
        min(rank, limit) if mode in modes else rank
        for mode, (rank, limit) in enumerate(zip(available, cutoff.limits, strict=True))
    ]
    return (min(kept),) * 2 if len(kept) == 2 and len(modes) == 2 else tuple(kept)


def _fitting(
    members: Members, step: Augmented | Lifted, truncation: Truncation, ranks: list[tuple[int, ...]]
) -> Examined:
    """The truncation with ranks that fit together, r_i <= prod_{j != i} r_j."""
    layout = members.layout
    possible = [possible_ranks(of, layout.modes) for of in ranks]
    if possible != ranks:
        again = truncate_stack(
            truncation.core, truncation.ranks, [Cutoff(limits=of) for of in possible], layout.modes
        )
        projections = tuple(
            first if first is None or second is None else first @ second
            for first, second in zip(truncation.projections, again.projections, strict=True)
        )
        truncation = Truncation(again.core, projections, again.ranks)
    target = Layout(layout.sizes, possible, layout.modes, layout.device)
    return Examined(members, step, truncation, target)


def _rows(numbers: Sequence[float], count: int) -> list[Sequence[float]]:
    """A flat table as `count` rows."""
    width = len(numbers) // max(1, count)
    return [numbers[width * n : width * (n + 1)] for n in range(count)]


def _ranks(numbers: Sequence[float], count: int) -> list[tuple[int, ...]]:
    """Ranks of `count` members from a flat table of them."""
    return [tuple(map(int, row)) for row in _rows(numbers, count)]
