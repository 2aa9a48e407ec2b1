"""Random Tucker tensors for tests: devices, hypothesis strategies, stacks, comparison by norm."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tdlrt.linalg import Layout

Tucker = tuple[Tensor, Sequence[Tensor | None]]
"""A core and its factors, None for a mode that is not factorised."""

laws = settings(derandomize=True, deadline=None, max_examples=100)
"""Settings of the property tests: the same examples in every run."""

stack_laws = settings(laws, max_examples=40)
"""Settings of property tests with several tensors an example."""

on_every_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
        ),
    ],
)

# By order; a mode of size 1 stands last, as hypothesis prefers what stands first.
MODE_SIZES = {2: (5, 7, 9, 2, 1), 3: (3, 4, 6, 2, 1), 4: (3, 4, 2, 1), 5: (2, 3, 1)}

dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 2**16)


def gaussian(
    shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Tensor:
    """Independent normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """A random orthonormal basis, float64."""
    return torch.linalg.qr(gaussian((rows, columns), seed))[0]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; the absolute error of a zero."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / (expected.norm() or 1.0))


def rounding(dtype: torch.dtype, factor: float = 100.0) -> float:
    """Relative error that a chain of well-conditioned operations may make."""
    return factor * torch.finfo(dtype).eps


def admissible(ranks: Sequence[int], modes: Collection[int] | None = None) -> tuple[int, ...]:
    """The ranks, lowered until r_i <= prod_{j != i} r_j in the given modes, all by default."""
    ranks = list(ranks)
    for i in range(len(ranks)) if modes is None else modes:
        ranks[i] = min(ranks[i], math.prod(ranks) // ranks[i])
    return tuple(ranks)


@dataclass(frozen=True)
class TuckerCase:
    """Shape, ranks, type and seed of a random Tucker tensor."""

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: torch.dtype
    seed: int

    @property
    def order(self) -> int:
        return len(self.shape)

    def core(self, device: str = "cpu") -> Tensor:
        return gaussian(self.ranks, self.seed, self.dtype, device)

    def factors(self, device: str = "cpu") -> list[Tensor]:
        sizes = zip(self.shape, self.ranks, strict=True)
        return [
            orthonormal(n, r, self.seed + 1 + i).to(device, self.dtype)
            for i, (n, r) in enumerate(sizes)
        ]

    def tucker(self, device: str = "cpu", modes: Collection[int] | None = None) -> Tucker:
        """Core and factors, those of the other modes left out."""
        factors = enumerate(self.factors(device))
        return self.core(device), [u if modes is None or i in modes else None for i, u in factors]

    def tensor(self, number: int, device: str = "cpu") -> Tensor:
        """A full tensor of the shape of the weight; another one for every number."""
        return gaussian(self.shape, self.seed + 100 + number, self.dtype, device)


@st.composite
def tucker_cases(draw: st.DrawFn, order: int | None = None) -> TuckerCase:
    order = order or draw(st.sampled_from([3, 4, 2, 5]))
    shape = draw(st.tuples(*[st.sampled_from(MODE_SIZES[order])] * order))
    shares = draw(st.tuples(*[st.sampled_from([1 / 2, 2 / 3, 1 / 3, 1])] * order))
    ranks = admissible([math.ceil(n * share) for n, share in zip(shape, shares, strict=True)])
    return TuckerCase(shape, ranks, draw(dtypes), draw(seeds))


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[TuckerCase], tuple[int, ...]]:
    """Tucker tensors of one order and type, of sizes that differ, and the modes factorised."""
    order, dtype = draw(st.sampled_from([3, 4, 2, 5])), draw(dtypes)
    modes = tuple(range(order)) if order < 3 or draw(st.booleans()) else (0, 1)
    cases = []
    for _ in range(draw(st.integers(2, 3))):
        case = draw(tucker_cases(order))
        ranks = [case.ranks[i] if i in modes else n for i, n in enumerate(case.shape)]
        cases.append(TuckerCase(case.shape, admissible(ranks, modes), dtype, case.seed))
    return cases, modes


# --- stacks -------------------------------------------------------------------------------------


def padded(members: Sequence[Tensor], shape: Sequence[int] | None = None) -> Tensor:
    """The members along a new first dimension, each in front of zeros that fill up the shape."""
    if shape is None:
        shape = [max(sizes) for sizes in zip(*(member.shape for member in members), strict=True)]
    result = members[0].new_zeros(len(members), *shape)
    for place, member in zip(result, members, strict=True):
        place[tuple(slice(0, size) for size in member.shape)] = member
    return result


def stack(
    members: Sequence[Tucker], modes: Collection[int] | None = None
) -> tuple[Tensor, list[Tensor | None], Layout]:
    """Padded core, padded factors and layout; by default every mode with a factor is factorised."""
    cores = [core for core, _ in members]
    by_mode = list(zip(*(factors for _, factors in members), strict=True))
    if modes is None:
        modes = [mode for mode, of in enumerate(by_mode) if of[0] is not None]
    sizes = [
        [r if u is None else len(u) for r, u in zip(core.shape, factors, strict=True)]
        for core, factors in members
    ]
    layout = Layout(sizes, [core.shape for core in cores], modes, cores[0].device)
    factors = [None if of[0] is None else padded(of) for of in by_mode]
    return padded(cores), factors, layout


def behind(stacked: Tensor, members: Sequence[Tensor]) -> Tensor:
    """The entries of a stack that stand behind its members."""
    mask = padded([torch.ones_like(member) for member in members], stacked.shape[1:])
    return stacked[mask == 0]


def stack_error(stacked: Tensor, members: Sequence[Tensor]) -> float:
    """Largest relative error of a member; what stands behind them has to be exactly zero."""
    assert len(stacked) == len(members)
    assert not behind(stacked, members).any()
    pairs = zip(stacked, members, strict=True)
    return max(
        relative_error(of[tuple(slice(0, size) for size in member.shape)], member)
        for of, member in pairs
    )
