import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference.cases import (
    dtypes,
    gaussian,
    laws,
    on_every_device,
    orthonormal,
    relative_error,
    rounding,
    seeds,
)
from tdlrt.linalg import (
    new_directions,
    orthonormality_error,
    orthonormality_tolerance,
    orthonormalize,
    polish_basis,
    reject,
)

KINDS = ("generic", "dependent", "zero", "inside", "nearly inside", "tiny", "graded")


def assert_orthonormal(basis: Tensor) -> None:
    gram = (basis.mT @ basis).double().cpu()
    deviation = (gram - torch.eye(basis.shape[1], dtype=torch.float64)).abs().max()
    assert deviation <= orthonormality_tolerance(basis.dtype, len(basis))


def directions(kind: str, basis: Tensor, columns: int, seed: int) -> Tensor:
    """n x columns directions, in every position that a gradient may have to the range of U."""
    n, r = basis.shape
    generic = gaussian((n, columns), seed)
    inside = basis @ gaussian((r, columns), seed + 1)
    match kind:
        case "generic":
            return generic
        case "dependent":
            return generic[:, :1].expand(n, columns).clone()
        case "zero":
            return torch.zeros(n, columns, dtype=torch.float64)
        case "inside":
            return inside
        case "nearly inside":
            return inside + 1e-9 * generic
        case "tiny":
            return 1e-20 * generic
        case _:
            return generic * torch.logspace(0, -12, columns, dtype=torch.float64)


@st.composite
def augmentations(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    n = draw(st.integers(1, 12))
    r, k = draw(st.integers(1, n)), draw(st.integers(1, n))
    seed, dtype = draw(seeds), draw(dtypes)
    basis = orthonormal(n, r, seed)
    added = directions(draw(st.sampled_from(KINDS)), basis, k, seed + 1)
    return basis.to(dtype), added.to(dtype)


@on_every_device
@laws
@given(n=st.integers(1, 12), k=st.integers(1, 15), dtype=dtypes, seed=seeds)
def test_orthonormalize_spans_the_matrix_with_fixed_signs(
    device: str, n: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    matrix = gaussian((n, k), seed, dtype, device)
    basis = orthonormalize(matrix)
    assert basis.shape == (n, min(n, k))
    assert_orthonormal(basis)
    triangle = basis.mT @ matrix
    assert relative_error(basis @ triangle, matrix) <= rounding(dtype)
    assert relative_error(triangle.triu(), triangle) <= rounding(dtype)
    assert (triangle.diagonal() > -rounding(dtype) * matrix.norm()).all()


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormalize_leaves_an_orthonormal_basis_alone(device: str, dtype: torch.dtype) -> None:
    basis = orthonormal(9, 4, 0).to(device, dtype)
    assert relative_error(orthonormalize(basis), basis) <= rounding(dtype)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_orthonormalize_completes_a_deficient_matrix(
    device: str, dtype: torch.dtype, rank: int
) -> None:
    matrix = (gaussian((7, rank), 0) @ gaussian((rank, 4), 1)).to(device, dtype)
    basis = orthonormalize(matrix)
    assert_orthonormal(basis)
    assert relative_error(basis @ (basis.mT @ matrix), matrix) <= rounding(dtype)


@on_every_device
@laws
@given(augmentation=augmentations())
def test_new_directions_complete_the_basis(
    device: str, augmentation: tuple[Tensor, Tensor]
) -> None:
    basis, added = (tensor.to(device) for tensor in augmentation)
    (n, r), k = basis.shape, added.shape[1]
    new = new_directions(basis, added)
    assert new.shape == (n, min(k, n - r))
    whole = torch.cat([basis, new], dim=1)
    assert_orthonormal(whole)
    # Column by column: a direction far shorter than its neighbours is spanned as well as they are.
    for column in added.mT:
        assert relative_error(whole @ (whole.mT @ column), column) <= rounding(basis.dtype)


@on_every_device
@laws
@given(augmentation=augmentations())
def test_reject_keeps_what_is_orthogonal(device: str, augmentation: tuple[Tensor, Tensor]) -> None:
    basis, added = (tensor.to(device) for tensor in augmentation)
    rest = reject(basis, added)
    allowed = rounding(basis.dtype) * added.norm()
    assert (basis.mT @ rest).norm() <= allowed
    assert (rest + basis @ (basis.mT @ added) - added).norm() <= allowed


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_polish_squares_the_orthonormality_error(size: float) -> None:
    spoilt = orthonormal(9, 4, 0) @ (torch.eye(4) + size * gaussian((4, 4), 1))
    before, after = orthonormality_error(spoilt), orthonormality_error(polish_basis(spoilt))
    assert before > size
    assert after <= 4 * before**2
    same_range = reject(orthonormal(9, 4, 0), polish_basis(spoilt))
    assert same_range.norm() <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polish_keeps_long_products_of_bases_orthonormal(dtype: torch.dtype) -> None:
    basis = orthonormal(64, 16, 0).to(dtype)
    for seed in range(200):
        basis = polish_basis(basis @ orthonormal(16, 16, seed).to(dtype))
    assert orthonormality_error(basis) <= orthonormality_tolerance(dtype, 64)


def test_orthonormality_error_is_the_largest_deviation() -> None:
    basis = torch.tensor([[1.0, -0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.1]])
    assert orthonormality_error(basis) == 0.5
