import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from reference.cases import (
    dtypes,
    gaussian,
    laws,
    on_every_device,
    orthonormal,
    padded,
    relative_error,
    rounding,
    seeds,
    stack_error,
    stack_laws,
)
from tdlrt.linalg import (
    Layout,
    damped_qr,
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


FLOOR = {torch.float32: 1e-6, torch.float64: 1e-10}
"""New directions shorter than this share of the longest are left out, as `new_directions` says."""


def padding_of(matrices: list[Tensor]) -> Tensor | None:
    """The padding of columns when these matrices are stacked."""
    shapes = [tuple(matrix.shape) for matrix in matrices]
    device = matrices[0].device
    return Layout([(n, k) for n, k in shapes], [(k, k) for _, k in shapes], (0,), device).padding(0)


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
    return draw(augmentation(draw(dtypes)))


@st.composite
def augmentation(draw: st.DrawFn, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n = draw(st.integers(1, 12))
    r, k = draw(st.integers(1, n)), draw(st.integers(1, n))
    seed = draw(seeds)
    basis = orthonormal(n, r, seed)
    added = directions(draw(st.sampled_from(KINDS)), basis, k, seed + 1)
    return basis.to(dtype), added.to(dtype)


@st.composite
def mixed_augmentations(draw: st.DrawFn) -> list[tuple[Tensor, Tensor]]:
    dtype = draw(dtypes)
    return draw(st.lists(augmentation(dtype), min_size=2, max_size=4))


@st.composite
def mixed_matrices(draw: st.DrawFn) -> list[Tensor]:
    """Matrices with as many rows as columns or more, of one type, for one stack."""
    dtype, matrices = draw(dtypes), []
    for _ in range(draw(st.integers(2, 4))):
        n = draw(st.integers(1, 12))
        matrices.append(gaussian((n, draw(st.integers(1, n))), draw(seeds), dtype))
    return matrices


def condition(matrix: Tensor) -> float:
    return float(torch.linalg.cond(reference.as_double(matrix)))


@on_every_device
@laws
@given(n=st.integers(1, 12), k=st.integers(1, 12), dtype=dtypes, seed=seeds)
def test_orthonormalize_spans_the_matrix_with_fixed_signs(
    device: str, n: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    matrix = gaussian((max(n, k), min(n, k)), seed, dtype, device)
    fallback = torch.full_like(matrix, math.nan)
    basis = orthonormalize(matrix[None], fallback[None])[0]
    assert basis.shape == matrix.shape
    assert basis.dtype == dtype
    assert_orthonormal(basis)
    triangle = basis.mT @ matrix
    assert relative_error(basis @ triangle, matrix) <= rounding(dtype)
    assert relative_error(triangle.triu(), triangle) <= rounding(dtype)
    assert (triangle.diagonal() > -rounding(dtype) * matrix.norm()).all()


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormalize_leaves_an_orthonormal_basis_alone(device: str, dtype: torch.dtype) -> None:
    basis = orthonormal(9, 4, 0).to(device, dtype)
    assert relative_error(orthonormalize(basis, 0 * basis), basis) <= rounding(dtype)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("share", "independent"), [(4, False), (32, True), (1000, True)])
def test_orthonormalize_tells_dependent_columns_by_eight_eps(
    device: str, dtype: torch.dtype, share: float, independent: bool
) -> None:
    """R_22 is so many eps of the length of its column."""
    matrix = torch.zeros(1, 9, 2, dtype=dtype, device=device)
    matrix[0, 0], matrix[0, 1, 1] = 1.0, share * torch.finfo(dtype).eps
    basis = orthonormalize(matrix, torch.zeros_like(matrix))[0]
    assert bool(basis.any()) == independent
    if independent:
        assert_orthonormal(basis)


@on_every_device
def test_orthonormalize_falls_back_where_columns_are_dependent_together(device: str) -> None:
    """No R_jj = 1 is small beside a column, but the condition number of k columns is above 2^k."""
    for columns in range(8, 34, 2):
        triangle = torch.eye(columns) - torch.ones(columns, columns).triu(1)
        members = [orthonormal(40, columns, seed) @ triangle.double() for seed in range(8)]
        matrix = torch.stack(members).float().to(device)
        fallback = torch.zeros_like(matrix)
        fallback[:, :columns] = torch.eye(columns)
        basis = orthonormalize(matrix, fallback)
        for member in basis:
            assert_orthonormal(member)
        if columns < 18:
            assert not (basis == fallback).all(dim=(1, 2)).any()
        if columns > 30:
            assert (basis == fallback).all()


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
def test_orthonormalize_falls_back_where_a_matrix_is_deficient(
    device: str, dtype: torch.dtype, rank: int, scale: float
) -> None:
    matrix = (gaussian((7, rank), 0) @ gaussian((rank, 4), 1) * scale).to(device, dtype)
    fine = (gaussian((7, 4), 2) * scale).to(device, dtype)
    fallback = orthonormal(7, 4, 3).to(device, dtype)
    basis = orthonormalize(torch.stack([matrix, fine, matrix]), fallback.expand(3, 7, 4))
    assert torch.equal(basis[0], fallback)
    assert torch.equal(basis[2], fallback)
    assert relative_error(basis[1], orthonormalize(fine, fallback)) <= rounding(dtype)
    assert not torch.equal(basis[1], fallback)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormalize_takes_columns_of_any_length(dtype: torch.dtype) -> None:
    lengths = torch.tensor([1.0, 1e-12, 1e12, 1e-3], dtype=torch.float64)
    matrix, expected = gaussian((9, 4), 0), orthonormalize(gaussian((9, 4), 0), torch.zeros(9, 4))
    basis = orthonormalize((matrix * lengths).to(dtype), torch.zeros(9, 4, dtype=dtype))
    assert relative_error(basis, expected) <= rounding(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_orthonormalize_falls_back_where_a_matrix_is_not_finite(
    dtype: torch.dtype, value: float
) -> None:
    matrix, fallback = gaussian((5, 3), 0, dtype), orthonormal(5, 3, 1).to(dtype)
    matrix[1, 1] = value
    assert torch.equal(orthonormalize(matrix, fallback), fallback)


@stack_laws
@given(matrices=mixed_matrices(), dependent=st.integers(0, 4))
def test_orthonormalize_takes_every_matrix_of_a_stack_on_its_own(
    matrices: list[Tensor], dependent: int
) -> None:
    for matrix in matrices[dependent:]:
        matrix[:, -1] = matrix[:, 0] if matrix.shape[1] > 1 else 0.0
    fallbacks = [orthonormal(*matrix.shape, 5).to(matrix) for matrix in matrices]
    found = orthonormalize(padded(matrices), padded(fallbacks), padding_of(matrices))
    pairs = zip(matrices, fallbacks, strict=True)
    expected = [orthonormalize(matrix, fallback) for matrix, fallback in pairs]
    worst = max(condition(matrix) for matrix in matrices[:dependent]) if dependent else 1.0
    assert stack_error(found, expected) <= rounding(matrices[0].dtype) * worst
    for result, fallback in zip(expected[dependent:], fallbacks[dependent:], strict=True):
        assert torch.equal(result, fallback)


@on_every_device
@stack_laws
@given(matrices=mixed_matrices(), strength=st.sampled_from([None, 0.0, 1e-8, 0.3]))
def test_damped_qr_is_what_it_says_in_a_stack(
    device: str, matrices: list[Tensor], strength: float | None
) -> None:
    matrices = [matrix.to(device) for matrix in matrices]
    stacked, padding = padded(matrices), padding_of(matrices)
    damping = None
    if strength is not None:
        damping = strength * gaussian((len(matrices), 1), 3, device=device).square()
    found = damped_qr(stacked, damping, padding)
    assert all(tensor.dtype == torch.float64 for tensor in found)
    basis, factor, inverse = (tensor.cpu() for tensor in found)
    assert not basis[padded([torch.ones_like(m) for m in matrices]).cpu() == 0].any()
    for number, matrix in enumerate(matrices):
        (n, k), exact = matrix.shape, reference.as_double(matrix)
        q, r = basis[number, :n, :k], factor[number, :k, :k]
        allowed = rounding(torch.float64) * condition(matrix)
        assert relative_error(q @ r, exact) <= allowed
        gram = exact.T @ exact
        if damping is not None:
            gram = gram + float(damping[number]) * torch.eye(k).double()
        assert relative_error(r.T @ r, gram) <= allowed
        assert torch.equal(r, r.triu())
        assert (r.diagonal() > 0).all()
        assert relative_error(r @ inverse[number, :k, :k], torch.eye(k)) <= allowed
        assert not factor[number, :k, k:].any()
        assert not inverse[number, :k, k:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_qr_factorisations_of_both_types_are_the_same(dtype: torch.dtype) -> None:
    matrix, damping = gaussian((2, 9, 4), 0).float(), torch.tensor([[0.0], [0.2]]).double()
    expected = damped_qr(matrix.double(), damping)
    for one, other in zip(damped_qr(matrix.to(dtype), damping), expected, strict=True):
        assert relative_error(one, other) <= 1e-13


@on_every_device
@laws
@given(augmentation=augmentations())
def test_new_directions_complete_the_basis(
    device: str, augmentation: tuple[Tensor, Tensor]
) -> None:
    basis, added = (tensor.to(device) for tensor in augmentation)
    (n, r), k = basis.shape, added.shape[1]
    new, count = new_directions(basis, added)
    assert new.shape == (n, k)
    assert count.dtype == torch.int64
    assert int(count) <= min(k, n - r)
    assert not new[:, count:].any()
    whole = torch.cat([basis, new[:, :count]], dim=1)
    assert_orthonormal(whole)
    # What is left out is shorter than the floor, in every direction.
    outside = reference.as_double(added)
    for _ in range(2):
        outside = reject(reference.as_double(basis), outside)
    left = reject(reference.as_double(new[:, :count]), outside)
    floor = FLOOR[basis.dtype] * torch.linalg.matrix_norm(outside, 2)
    allowed = rounding(basis.dtype) * added.norm().cpu()
    assert torch.linalg.matrix_norm(left, 2) <= 1.01 * floor + allowed
    # They are left singular vectors, the largest singular value first.
    reached = reference.as_double(new[:, :count]).T @ outside
    values = torch.linalg.svdvals(outside)[:count]
    error = (reached @ reached.T - values.square().diag()).norm()
    assert error <= allowed * outside.norm()


@pytest.mark.parametrize("kind", ["generic", "dependent", "zero", "graded"])
@pytest.mark.parametrize(("r", "k"), [(3, 2), (3, 6), (7, 2), (8, 3)])
def test_new_directions_equal_their_twin(kind: str, r: int, k: int) -> None:
    basis = orthonormal(8, r, 0)
    added = directions(kind, basis, k, 1)
    new, count = new_directions(basis, added)
    found, expected = torch.cat([basis, new], dim=1), reference.augmented_basis(basis, added)
    assert r + int(count) == expected.shape[1]
    assert relative_error(found @ found.T, expected @ expected.T) <= 1e-12


@on_every_device
@stack_laws
@given(augmentations=mixed_augmentations())
def test_new_directions_of_every_member_of_a_stack(
    device: str, augmentations: list[tuple[Tensor, Tensor]]
) -> None:
    bases, added = ([pair[i].to(device) for pair in augmentations] for i in (0, 1))
    spare = [basis.shape[0] - basis.shape[1] for basis in bases]
    most = torch.tensor(spare, device=device)
    new, counts = new_directions(padded(bases), padded(added), most)
    alone = [new_directions(*pair) for pair in zip(bases, added, strict=True)]
    dtype = bases[0].dtype
    for number, (basis, directions, (expected, count)) in enumerate(
        zip(bases, added, alone, strict=True)
    ):
        outside = reject(basis.double(), directions.double())
        if outside.norm() <= rounding(dtype, 1e3) * directions.norm():
            continue  # nothing but rounding: how much of it there is, nobody can know
        assert int(counts[number]) == int(count)
        found = new[number, : len(basis), :count]
        gaps = FLOOR[dtype] ** -1
        error = relative_error(found @ found.mT, expected[:, :count] @ expected[:, :count].mT)
        assert error <= rounding(dtype) * gaps
    assert not new[padded([torch.ones_like(of) for of in added]) == 0].any()


def test_new_directions_are_at_most_as_many_as_asked_for() -> None:
    basis = torch.stack([orthonormal(9, 3, n) for n in range(3)])
    added = torch.stack([gaussian((9, 4), n) for n in range(3)])
    everything, _ = new_directions(basis, added)
    for most, expected in ((2, [2, 2, 2]), (torch.tensor([2, 0, 7]), [2, 0, 4])):
        new, counts = new_directions(basis, added, most)
        assert counts.tolist() == expected
        for found, whole, count in zip(new, everything, expected, strict=True):
            assert relative_error(found[:, :count], whole[:, :count]) <= 1e-13
            assert not found[:, count:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_spoils_no_other_member(dtype: torch.dtype) -> None:
    basis = torch.stack([orthonormal(9, 3, n) for n in range(2)]).to(dtype)
    added = torch.stack([gaussian((9, 4), n) for n in range(2)]).to(dtype)
    expected, _ = new_directions(basis, added)
    added[0, 1, 1] = math.nan
    found, counts = new_directions(basis, added)
    assert counts[1] == 4
    assert torch.equal(found[1], expected[1])


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
