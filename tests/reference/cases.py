"""Random Tucker tensors for tests: devices, hypothesis strategies, comparison by norm."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

laws = settings(derandomize=True, deadline=None, max_examples=100)
"""Settings of the property tests: the same examples in every run."""

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


def admissible(ranks: Sequence[int]) -> tuple[int, ...]:
    """The ranks, lowered until r_i <= prod_{j != i} r_j."""
    ranks = list(ranks)
    for i, rank in enumerate(ranks):
        ranks[i] = min(rank, math.prod(ranks) // rank)
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

    def tensor(self, number: int, device: str = "cpu") -> Tensor:
        """A full tensor of the shape of the weight; another one for every number."""
        return gaussian(self.shape, self.seed + 100 + number, self.dtype, device)


@st.composite
def tucker_cases(draw: st.DrawFn) -> TuckerCase:
    order = draw(st.sampled_from([3, 4, 2, 5]))
    shape = draw(st.tuples(*[st.sampled_from(MODE_SIZES[order])] * order))
    shares = draw(st.tuples(*[st.sampled_from([1 / 2, 2 / 3, 1 / 3, 1])] * order))
    ranks = admissible([math.ceil(n * share) for n, share in zip(shape, shares, strict=True)])
    return TuckerCase(shape, ranks, draw(dtypes), draw(seeds))
