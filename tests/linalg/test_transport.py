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
    mixtures,
    on_every_device,
    orthonormal,
    padded,
    relative_error,
    rounding,
    stack,
    stack_error,
    stack_laws,
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


@st.composite
def mixed_moves(
    draw: st.DrawFn,
) -> tuple[list[TuckerCase], list[TuckerCase], tuple[int, ...]]:
    """The same for several members of different sizes, with the modes that are factorised."""
    cases, modes = draw(mixtures())
    targets = []
    for case in cases:
        drawn = [draw(st.integers(1, n)) if i in modes else n for i, n in enumerate(case.shape)]
        ranks = admissible(drawn, modes)
        targets.append(TuckerCase(case.shape, ranks, case.dtype, case.seed + 1000))
    return cases, targets, modes


def single(case: TuckerCase, device: str = "cpu") -> TangentSpace:
    """The space of a stack of one."""
    return TangentSpace(*stack([case.tucker(device)]))


def transport_to(source: TangentSpace, target: TangentSpace) -> Transport:
    return Transport(source, target.factors, target.layout)


def any_tangent_vector(space: TangentSpace, seed: int) -> TangentVector:
    """With parts that nothing else is made of."""
    parts = {}
    for mode in space.moving_modes:
        basis = space.factor(mode)
        part = gaussian(basis.shape[1:], seed + mode).to(basis)
        parts[mode] = part - basis @ (basis.mT @ part)
    return TangentVector(gaussian(space.core.shape[1:], seed).to(space.core)[None], parts)


def positive(space: TangentSpace, seed: int) -> TangentVector:
    """A quantity per coordinate, between 0.5 and 3."""

    def numbers(like: Tensor, number: int) -> Tensor:
        return 0.5 + 2.5 * gaussian(like.shape, number).sigmoid().to(like)

    parts = {m: numbers(space.factor(m), seed + 1 + m) for m in space.moving_modes}
    return TangentVector(numbers(space.core, seed), parts)


def condition(core: Tensor) -> float:
    """Largest condition number of an unfolding of a stack of one core."""
    unfoldings = (reference.unfold(double(core[0]), mode) for mode in range(core[0].ndim))
    return max(float(torch.linalg.cond(matrix)) for matrix in unfoldings)


@on_every_device
@laws
@given(move=moves())
def test_vectors_are_projected_onto_any_other_space(
    device: str, move: tuple[TuckerCase, TuckerCase]
) -> None:
    source_case, target_case = move
    source, target = single(source_case, device), single(target_case, device)
    tangent = any_tangent_vector(source, source_case.seed)
    transport = transport_to(source, target)
    found = transport.vector(tangent, transport.cut(tangent), target)
    dense = double(source.to_tensor(tangent)[0])
    expected = reference.tangent_projection(
        double(target.core[0]), [double(u[0]) for u in target.factors], dense
    )
    allowed = rounding(source_case.dtype) * condition(target.core) * float(dense.norm() or 1)
    assert (double(target.to_tensor(found)[0]) - expected).norm() <= allowed
    assert tuple(found.parts) == target.moving_modes
    for mode, part in found.parts.items():
        shadow = target.factor(mode).mT @ part
        assert shadow.abs().max() <= rounding(source_case.dtype) * float(dense.norm())
    pulled = reference.multi_product(double(source.core[0]), overlaps(source, target))
    error = (double(transport.point()[0]) - pulled).norm()
    assert error <= rounding(source_case.dtype) * source.core.norm()


def overlaps(source: TangentSpace, target: TangentSpace) -> list[Tensor]:
    """R_j = V_j^T U_j."""
    pairs = zip(source.factors, target.factors, strict=True)
    return [double(v[0]).T @ double(u[0]) for u, v in pairs]


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
    core = reference.multi_product(double(quantity.core[0]), [mixing(r) for r in turns])
    parts = {}
    for mode in target.moving_modes:
        if mode not in source.moving_modes:
            parts[mode] = torch.full_like(double(target.factor(mode)[0]), float(core.mean()))
        else:
            others = reference.kronecker([r for j, r in enumerate(turns) if j != mode])
            turn = double(target.rows(mode)[0]) @ others @ double(source.rows(mode)[0]).T
            parts[mode] = double(quantity.parts[mode][0]) @ mixing(turn).T
    return TangentVector(core, parts)


@on_every_device
@laws
@given(move=moves())
def test_squares_follow_the_formula_and_stay_in_their_range(
    device: str, move: tuple[TuckerCase, TuckerCase]
) -> None:
    source_case, target_case = move
    source, target = single(source_case, device), single(target_case, device)
    transport = transport_to(source, target)
    quantity = positive(source, source_case.seed)
    found = transport.squares(quantity, target)
    expected = dense_squares(source, target, quantity)
    allowed = rounding(source_case.dtype)
    assert relative_error(found.core[0], expected.core) <= allowed
    assert tuple(found.parts) == target.moving_modes
    blocks = [(found.core, quantity.core)]
    for mode, part in found.parts.items():
        assert part.shape == target.factor(mode).shape
        assert relative_error(part[0], expected.parts[mode]) <= allowed
        moved = mode in source.moving_modes
        blocks.append((part, quantity.parts[mode] if moved else quantity.core))
    for new, old in blocks:
        assert old.min() * (1 - allowed) <= new.min()
        assert new.max() <= old.max() * (1 + allowed)


@laws
@given(move=moves(), value=st.sampled_from([0.0, 1e-12, 1.0, 7.5]))
def test_constants_stay(move: tuple[TuckerCase, TuckerCase], value: float) -> None:
    source_case, target_case = move
    source, target = single(source_case), single(target_case)
    constant = TangentVector(
        torch.full_like(source.core, value),
        {mode: torch.full_like(source.factor(mode), value) for mode in source.moving_modes},
    )
    found = transport_to(source, target).squares(constant, target)
    for part in (found.core, *found.parts.values()):
        assert ((part - value).abs() <= rounding(source_case.dtype) * value).all()


@pytest.mark.parametrize("kept", [False, True])
@laws
@given(case=tucker_cases())
def test_nothing_changes_where_nothing_moves(kept: bool, case: TuckerCase) -> None:
    space = single(case)
    again = TangentSpace(case.core()[None], space.factors, space.layout) if kept else single(case)
    transport = transport_to(space, again)
    tangent, quantity = any_tangent_vector(space, case.seed), positive(space, case.seed)
    moved = transport.vector(tangent, transport.cut(tangent), again)
    squares = transport.squares(quantity, again)
    allowed = rounding(case.dtype)
    assert relative_error(transport.point(), space.core) <= allowed
    assert relative_error(moved.core, tangent.core) <= allowed
    assert relative_error(squares.core, quantity.core) <= allowed
    for mode in space.moving_modes:
        assert relative_error(moved.parts[mode], tangent.parts[mode]) <= allowed
        assert relative_error(squares.parts[mode], quantity.parts[mode]) <= allowed


@laws
@given(move=moves())
def test_a_transport_is_the_same_for_every_vector_it_moves(
    move: tuple[TuckerCase, TuckerCase],
) -> None:
    source, target = single(move[0]), single(move[1])
    transport = transport_to(source, target)
    for number in (1, 2):
        tangent, quantity = any_tangent_vector(source, number), positive(source, number)
        fresh = transport_to(source, target)
        found = transport.vector(tangent, transport.cut(tangent), target)
        expected = fresh.vector(tangent, fresh.cut(tangent), target)
        squares, same = transport.squares(quantity, target), fresh.squares(quantity, target)
        for mode in target.moving_modes:
            assert torch.equal(found.parts[mode], expected.parts[mode])
            assert torch.equal(squares.parts[mode], same.parts[mode])


def test_only_the_modes_that_are_factorised_move() -> None:
    shape, ranks = (6, 5, 3), (3, 2, 3)
    free = [orthonormal(n, r, 1 + n) for n, r in zip(shape[:2], ranks[:2], strict=True)]
    new = [orthonormal(n, r, 9 + n) for n, r in zip(shape[:2], ranks[:2], strict=True)]
    source = TangentSpace(*stack([(gaussian(ranks, 0), [*free, None])]))
    target = TangentSpace(*stack([(gaussian(ranks, 5), [*new, None])]))
    tangent = any_tangent_vector(source, 3)
    transport = transport_to(source, target)
    found = target.to_tensor(transport.vector(tangent, transport.cut(tangent), target))[0]
    bases = [*new, torch.eye(3, dtype=torch.float64)]
    dense = source.to_tensor(tangent)[0]
    expected = reference.tangent_projection(target.core[0], bases, dense)
    assert relative_error(found, expected) <= rounding(torch.float64) * condition(target.core)
    squares = transport.squares(positive(source, 3), target)
    assert tuple(squares.parts) == (0, 1)


def test_bases_that_did_not_move_at_a_core_of_zeros_begin_with_the_mean() -> None:
    cases = [TuckerCase((6, 5, 4), (3, 2, 2), torch.float64, seed) for seed in (0, 1)]
    core, factors, layout = stack([case.tucker() for case in cases])
    core[0] = 0
    source = TangentSpace(core, factors, layout)
    target = TangentSpace(*stack([c.tucker() for c in cases]))
    quantity = positive(source, 3)
    squares = transport_to(source, target).squares(quantity, target)
    alone = single(cases[1])
    own = TangentVector(quantity.core[1:], {m: p[1:] for m, p in quantity.parts.items()})
    expected = transport_to(alone, alone).squares(own, alone)
    assert relative_error(squares.core[0], quantity.core[0]) <= 1e-13
    for mode, part in squares.parts.items():
        means = torch.full_like(part[0], float(quantity.core[0].mean()))
        assert relative_error(part[0], means) <= 1e-13
        assert relative_error(part[1], expected.parts[mode][0]) <= 1e-13


# --- stacks of members of different sizes -------------------------------------------------------


Moves = tuple[list[TuckerCase], list[TuckerCase], tuple[int, ...]]


class Together:
    """Spaces before and after of a padded stack, and those of every member alone."""

    def __init__(self, move: Moves, device: str) -> None:
        sources, targets, modes = move
        old, new = ([c.tucker(device, modes) for c in of] for of in (sources, targets))
        self.source, self.target = TangentSpace(*stack(old)), TangentSpace(*stack(new))
        self.pairs = [
            (TangentSpace(*stack([u])), TangentSpace(*stack([v])))
            for u, v in zip(old, new, strict=True)
        ]
        worst = max(condition(target.core) for _, target in self.pairs)
        self.allowed = rounding(sources[0].dtype) * worst

    def join(self, alone: list[TangentVector]) -> TangentVector:
        """What every member has, in one stack at the source."""
        parts = {
            mode: padded(
                [
                    self._part(vector, self.source, number, mode)
                    for number, vector in enumerate(alone)
                ]
            )
            for mode in self.source.moving_modes
        }
        return TangentVector(padded([vector.core[0] for vector in alone]), parts)

    @staticmethod
    def _part(vector: TangentVector, space: TangentSpace, number: int, mode: int) -> Tensor:
        size, rank = (of[number][mode] for of in (space.layout.sizes, space.layout.ranks))
        part = vector.parts.get(mode)
        return vector.core.new_zeros(size, rank) if part is None else part[0]

    def error(self, found: TangentVector, alone: list[TangentVector], *, padding: bool) -> float:
        """Largest error of a part at the target; `padding` where that has to be zero."""
        errors = [stack_error(found.core, [vector.core[0] for vector in alone])]
        assert tuple(found.parts) == self.target.moving_modes
        for mode, part in found.parts.items():
            expected = [self._part(v, self.target, n, mode) for n, v in enumerate(alone)]
            if padding:
                errors.append(stack_error(part, expected))
            else:
                errors += [
                    relative_error(of[: len(own), : own.shape[1]], own)
                    for of, own in zip(part, expected, strict=True)
                ]
        return max(errors)


@on_every_device
@stack_laws
@given(move=mixed_moves())
def test_vectors_in_a_stack_move_as_they_do_alone(device: str, move: Moves) -> None:
    together = Together(move, device)
    vectors = [any_tangent_vector(source, 3 + n) for n, (source, _) in enumerate(together.pairs)]
    transport = transport_to(together.source, together.target)
    joined = together.join(vectors)
    found = transport.vector(joined, transport.cut(joined), together.target)
    alone, points = [], []
    for (source, target), vector in zip(together.pairs, vectors, strict=True):
        own = transport_to(source, target)
        alone.append(own.vector(vector, own.cut(vector), target))
        points.append(own.point()[0])
    assert together.error(found, alone, padding=True) <= together.allowed
    assert stack_error(transport.point(), points) <= together.allowed


@on_every_device
@stack_laws
@given(move=mixed_moves())
def test_squares_in_a_stack_move_as_they_do_alone(device: str, move: Moves) -> None:
    together = Together(move, device)
    quantities = [positive(source, 3 + n) for n, (source, _) in enumerate(together.pairs)]
    joined = together.join(quantities)
    found = transport_to(together.source, together.target).squares(joined, together.target)
    alone = [
        transport_to(source, target).squares(quantity, target)
        for (source, target), quantity in zip(together.pairs, quantities, strict=True)
    ]
    assert together.error(found, alone, padding=False) <= together.allowed
    # What stands in the padding of the parts is never read.
    dirty = {mode: part + (part == 0) * 9.0 for mode, part in joined.parts.items()}
    moved = transport_to(together.source, together.target).squares(
        TangentVector(joined.core, dirty), together.target
    )
    assert together.error(moved, alone, padding=False) <= together.allowed


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


def test_shares_say_which_directions_there_are() -> None:
    matrix = torch.zeros(2, 2, 3, dtype=torch.float64)
    matrix[0, 0, 0], matrix[1, :, :] = math.sqrt(0.5), 0.5
    shares = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]], [[1 / 3] * 3] * 2]).double()
    weights = stochastic(matrix, shares)
    assert torch.allclose(weights[0], torch.tensor([[0.75, 0.25, 0], [0, 0, 0]]).double())
    assert torch.allclose(weights[1], stochastic(matrix[1]))
