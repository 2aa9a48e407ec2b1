"""Transport between tangent spaces: first moments by projection, second moments by mixing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from reference.cases import (
    TuckerCase,
    admissible,
    gaussian,
    laws,
    on_every_device,
    orthonormal,
    relative_error,
    rounding,
    tucker_cases,
)
from tdlrt.linalg import TangentSpace, TangentVector, Transport, stochastic

double = reference.as_double


@st.composite
def moves(draw: st.DrawFn) -> tuple[TuckerCase, TuckerCase]:
    """A source, and a target of other ranks whose core and bases have nothing to do with it."""
    case = draw(tucker_cases())
    ranks = admissible([draw(st.integers(1, n)) for n in case.shape])
    return case, TuckerCase(case.shape, ranks, case.dtype, case.seed + 1000)


def any_tangent_vector(space: TangentSpace, seed: int) -> TangentVector:
    """With parts that nothing else is made of; zero where a mode does not move."""
    parts = []
    for mode, basis in enumerate(space.factors):
        part = gaussian(basis.shape, seed + mode).to(basis)
        part = part - basis @ (basis.mT @ part)
        parts.append(part if mode in space.moving_modes else torch.zeros_like(part))
    return TangentVector(gaussian(space.core.shape, seed).to(space.core), tuple(parts))


def positive(space: TangentSpace, seed: int) -> TangentVector:
    """A quantity per coordinate, between 0.5 and 3."""

    def numbers(like: Tensor, number: int) -> Tensor:
        return 0.5 + 2.5 * gaussian(like.shape, number).sigmoid().to(like)

    parts = [numbers(basis, seed + 1 + mode) for mode, basis in enumerate(space.factors)]
    return TangentVector(numbers(space.core, seed), tuple(parts))


def condition(core: Tensor) -> float:
    unfoldings = (reference.unfold(double(core), mode) for mode in range(core.ndim))
    return max(float(torch.linalg.cond(matrix)) for matrix in unfoldings)


@on_every_device
@laws
@given(move=moves())
def test_vectors_are_projected_onto_any_other_space(
    device: str, move: tuple[TuckerCase, TuckerCase]
) -> None:
    source_case, target_case = move
    source = TangentSpace(source_case.core(device), source_case.factors(device))
    target = TangentSpace(target_case.core(device), target_case.factors(device))
    tangent = any_tangent_vector(source, source_case.seed)
    transport = Transport(source, target.factors)
    found = transport.vector(tangent, transport.cut(tangent), target)
    dense = double(source.to_tensor(tangent))
    expected = reference.tangent_projection(
        double(target.core), [double(u) for u in target.factors], dense
    )
    allowed = rounding(source_case.dtype) * condition(target.core) * float(dense.norm() or 1)
    assert (double(target.to_tensor(found)) - expected).norm() <= allowed
    for basis, part in zip(target.factors, found.factors, strict=True):
        assert (basis.mT @ part).abs().max() <= rounding(source_case.dtype) * float(dense.norm())
    pulled = reference.multi_product(double(source.core), overlaps(source, target))
    error = (double(transport.point()) - pulled).norm()
    assert error <= rounding(source_case.dtype) * source.core.norm()


def overlaps(source: TangentSpace, target: TangentSpace) -> list[Tensor]:
    """R_j = V_j^T U_j."""
    pairs = zip(source.factors, target.factors, strict=True)
    return [double(v).T @ double(u) for u, v in pairs]


def mixing(matrix: Tensor) -> Tensor:
    """A of `stochastic`, entry by entry."""
    rows, columns = matrix.shape
    result = torch.empty_like(matrix)
    for i in range(rows):
        missing = max(0.0, 1.0 - sum(float(matrix[i, k]) ** 2 for k in range(columns)))
        for j in range(columns):
            result[i, j] = float(matrix[i, j]) ** 2 + missing / columns
    return result


def dense_squares(
    source: TangentSpace, target: TangentSpace, quantity: TangentVector
) -> TangentVector:
    """The docstring's formula, with the Kronecker product of the R_j in full."""
    turns = overlaps(source, target)
    core = reference.multi_product(double(quantity.core), [mixing(r) for r in turns])
    parts = []
    for mode, basis in enumerate(target.factors):
        if mode not in target.moving_modes:
            parts.append(torch.zeros_like(double(basis)))
        elif mode not in source.moving_modes:
            parts.append(torch.full_like(double(basis), float(core.mean())))
        else:
            others = reference.kronecker([r for j, r in enumerate(turns) if j != mode])
            turn = double(target.rows(mode)) @ others @ double(source.rows(mode)).T
            parts.append(double(quantity.factors[mode]) @ mixing(turn).T)
    return TangentVector(core, tuple(parts))


@on_every_device
@laws
@given(move=moves())
def test_squares_follow_the_formula_and_stay_in_their_range(
    device: str, move: tuple[TuckerCase, TuckerCase]
) -> None:
    source_case, target_case = move
    source = TangentSpace(source_case.core(device), source_case.factors(device))
    target = TangentSpace(target_case.core(device), target_case.factors(device))
    transport = Transport(source, target.factors)
    quantity = positive(source, source_case.seed)
    found = transport.squares(quantity, target)
    expected = dense_squares(source, target, quantity)
    allowed = rounding(source_case.dtype)
    assert relative_error(found.core, expected.core) <= allowed
    blocks = [(found.core, quantity.core)]
    for mode in range(source_case.order):
        part = found.factors[mode]
        assert part.shape == target.factors[mode].shape
        assert relative_error(part, expected.factors[mode]) <= allowed
        if mode in target.moving_modes:
            moved = mode in source.moving_modes
            blocks.append((part, quantity.factors[mode] if moved else quantity.core))
    for new, old in blocks:
        assert old.min() * (1 - allowed) <= new.min()
        assert new.max() <= old.max() * (1 + allowed)


@laws
@given(move=moves(), value=st.sampled_from([0.0, 1e-12, 1.0, 7.5]))
def test_constants_stay(move: tuple[TuckerCase, TuckerCase], value: float) -> None:
    source_case, target_case = move
    source = TangentSpace(source_case.core(), source_case.factors())
    target = TangentSpace(target_case.core(), target_case.factors())
    constant = TangentVector(
        torch.full_like(source.core, value),
        tuple(torch.full_like(basis, value) for basis in source.factors),
    )
    found = Transport(source, target.factors).squares(constant, target)
    parts = [found.core, *(found.factors[mode] for mode in target.moving_modes)]
    for part in parts:
        assert ((part - value).abs() <= rounding(source_case.dtype) * value).all()


@laws
@given(case=tucker_cases())
def test_nothing_changes_where_nothing_moves(case: TuckerCase) -> None:
    space = TangentSpace(case.core(), case.factors())
    again = TangentSpace(case.core(), case.factors())
    transport = Transport(space, again.factors)
    tangent, quantity = any_tangent_vector(space, case.seed), positive(space, case.seed)
    moved = transport.vector(tangent, transport.cut(tangent), again)
    squares = transport.squares(quantity, again)
    allowed = rounding(case.dtype)
    assert relative_error(moved.core, tangent.core) <= allowed
    assert relative_error(squares.core, quantity.core) <= allowed
    for mode in space.moving_modes:
        assert relative_error(moved.factors[mode], tangent.factors[mode]) <= allowed
        assert relative_error(squares.factors[mode], quantity.factors[mode]) <= allowed


@laws
@given(move=moves())
def test_one_transport_serves_several_targets(move: tuple[TuckerCase, TuckerCase]) -> None:
    case, arrival = move
    source = TangentSpace(case.core(), case.factors())
    bases = arrival.factors()
    transport, tangent = Transport(source, bases), any_tangent_vector(source, 3)
    for number in (1, 2):
        core = gaussian(arrival.ranks, number, arrival.dtype)
        target, fresh = TangentSpace(core, bases), Transport(source, bases)
        found = transport.vector(tangent, transport.cut(tangent), target)
        expected = fresh.vector(tangent, fresh.cut(tangent), target)
        for mode in target.moving_modes:
            assert torch.equal(found.factors[mode], expected.factors[mode])


def test_only_the_modes_that_are_factorised_move() -> None:
    shape, ranks = (6, 5, 3), (3, 2, 3)
    free = [orthonormal(n, r, 1 + n) for n, r in zip(shape, ranks, strict=True)]
    new = [orthonormal(n, r, 9 + n) for n, r in zip(shape, ranks, strict=True)]
    free[2] = new[2] = torch.eye(3, dtype=torch.float64)
    source = TangentSpace(gaussian(ranks, 0), free, modes=(0, 1))
    target = TangentSpace(gaussian(ranks, 5), new, modes=(0, 1))
    tangent = any_tangent_vector(source, 3)
    transport = Transport(source, target.factors)
    found = target.to_tensor(transport.vector(tangent, transport.cut(tangent), target))
    expected = reference.tangent_projection(target.core, new, source.to_tensor(tangent))
    assert relative_error(found, expected) <= rounding(torch.float64) * condition(target.core)
    squares = transport.squares(positive(source, 3), target)
    assert not squares.factors[2].any()


def test_rows_that_rounding_makes_too_long_do_not_become_negative() -> None:
    matrix = torch.eye(3) * (1 + 1e-6)
    weights = stochastic(matrix)
    assert (weights >= 0).all()
    assert torch.allclose(weights.sum(dim=1), torch.ones(3))


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_a_direction_that_is_new_gets_the_mean(columns: int) -> None:
    matrix = torch.zeros(2, columns, dtype=torch.float64)
    matrix[0, 0] = math.sqrt(0.5)
    weights = stochastic(matrix)
    assert torch.allclose(weights.sum(dim=1), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(weights[1], torch.full((columns,), 1 / columns, dtype=torch.float64))
    assert float(weights[0, 0]) == pytest.approx(0.5 + 0.5 / columns)
