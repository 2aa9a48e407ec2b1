import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from reference.cases import (
    Tucker,
    TuckerCase,
    behind,
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
from tdlrt.errors import RankError
from tdlrt.linalg import (
    TangentSpace,
    TangentVector,
    Transport,
    factorize_core,
    fold,
    multi_mode_product,
    new_directions,
)

double = reference.as_double


def twin(core: Tensor, factors: Sequence[Tensor], z: Tensor, damping: float = 0.0) -> Tensor:
    return reference.tangent_projection(
        double(core), [double(u) for u in factors], double(z), damping
    )


def damping(core: Tensor) -> float:
    """(8 eps ||C||)^2."""
    return (8 * torch.finfo(core.dtype).eps * float(double(core).norm())) ** 2


def single(core: Tensor, factors: Sequence[Tensor | None]) -> TangentSpace:
    """The space of a stack of one."""
    return TangentSpace(*stack([(core, factors)]))


def norm(tangent: TangentVector) -> Tensor:
    return tangent.squared_norms().sum().sqrt()


def autograd(core: Tensor, factors: Sequence[Tensor], z: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The gradients of <Z, W> for C and U_i."""
    leaves = [tensor.clone().requires_grad_() for tensor in (core, *factors)]
    loss = (multi_mode_product(leaves[0], leaves[1:]) * z).sum()
    core_gradient, *factor_gradients = torch.autograd.grad(loss, leaves)
    return core_gradient, factor_gradients


def riemannian_gradient(core: Tensor, factors: list[Tensor], z: Tensor) -> TangentVector:
    """The projection of Z by way of the gradients of <Z, W> that autograd gives for C and U_i."""
    core_gradient, gradients = autograd(core, factors, z)
    by_mode = {mode: gradient[None] for mode, gradient in enumerate(gradients)}
    return single(core, factors).gradient(core_gradient[None], by_mode)


def condition(core: Tensor) -> float:
    """Largest condition number of an unfolding of the core."""
    unfoldings = (reference.unfold(double(core), i) for i in range(core.ndim))
    return max(float(torch.linalg.cond(matrix)) for matrix in unfoldings)


def core_with_smallest_value(value: float, ranks: tuple[int, ...], mode: int) -> Tensor:
    """A random core whose unfolding in one mode has singular values from 1 down to ``value``."""
    values = torch.linspace(1, 0.5, ranks[mode], dtype=torch.float64)
    values[-1] = value
    return core_with_values(values, ranks, mode)


def core_with_values(values: Tensor, ranks: tuple[int, ...], mode: int) -> Tensor:
    """A random core whose unfolding in one mode has these singular values."""
    left, _, right = torch.linalg.svd(
        reference.unfold(gaussian(ranks, 0), mode), full_matrices=False
    )
    return reference.fold(left @ values.diag() @ right, mode, ranks)


@on_every_device
@laws
@given(case=tucker_cases())
def test_projection_equals_its_twin(device: str, case: TuckerCase) -> None:
    core, factors, z = case.core(device), case.factors(device), case.tensor(0, device)
    space = single(core, factors)
    projected = space.project(z[None])
    dense = space.to_tensor(projected)[0]
    assert relative_error(dense, twin(core, factors, z)) <= rounding(case.dtype) * condition(core)
    assert relative_error(norm(projected), dense.norm()) <= rounding(case.dtype)


@on_every_device
@laws
@given(case=tucker_cases())
def test_projection_is_idempotent_and_self_adjoint(device: str, case: TuckerCase) -> None:
    space = single(*case.tucker(device))
    a, b = case.tensor(0, device), case.tensor(1, device)
    projected_a, projected_b = (space.to_tensor(space.project(z[None])) for z in (a, b))
    again = space.to_tensor(space.project(projected_a))
    assert (again - projected_a).norm() <= rounding(case.dtype) * a.norm()
    difference = (projected_a * b).sum() - (a * projected_b).sum()
    assert difference.abs() <= rounding(case.dtype) * a.norm() * b.norm()


@on_every_device
@laws
@given(case=tucker_cases())
def test_gradients_of_core_and_factors_give_the_projected_gradient(
    device: str, case: TuckerCase
) -> None:
    core, factors, z = case.core(device), case.factors(device), case.tensor(0, device)
    dense = single(core, factors).to_tensor(riemannian_gradient(core, factors, z))[0]
    assert relative_error(dense, twin(core, factors, z)) <= rounding(case.dtype) * condition(core)


@on_every_device
@laws
@given(case=tucker_cases())
def test_basis_parts_are_orthogonal_to_the_bases(device: str, case: TuckerCase) -> None:
    core, factors, z = case.core(device), case.factors(device), case.tensor(0, device)
    space = single(core, factors)
    parts = space.project(z[None]).parts
    assert tuple(parts) == space.moving_modes
    for mode, part in parts.items():
        assert part.shape == (1, *factors[mode].shape)
        assert (factors[mode].mT @ part).norm() <= rounding(case.dtype) * z.norm()


@on_every_device
@laws
@given(case=tucker_cases())
def test_embedding_in_augmented_bases_changes_nothing(device: str, case: TuckerCase) -> None:
    space = single(*case.tucker(device))
    tangent = space.project(case.tensor(0, device)[None])
    new = {
        mode: new_directions(space.factor(mode), part, space.layout.spare(mode))[0]
        for mode, part in tangent.parts.items()
    }
    bases = [
        torch.cat([u, new[mode]], dim=2) if mode in new else u
        for mode, u in enumerate(space.factors)
    ]
    embedded = multi_mode_product(space.embed(tangent, new), bases)
    assert relative_error(embedded, space.to_tensor(tangent)) <= rounding(case.dtype)


def test_only_the_chosen_modes_move_and_a_full_basis_never_does() -> None:
    core, z = gaussian((2, 2, 3), 0), gaussian((5, 4, 3), 1)
    factors = [orthonormal(n, r, n) for n, r in zip(z.shape, core.shape, strict=True)]
    expected = twin(core, factors, z)
    assert single(core, factors).moving_modes == (0, 1)

    space = TangentSpace(*stack([(core, factors)], modes=(1,)))
    tangent = space.project(z[None])
    assert space.moving_modes == (1,)
    assert tuple(tangent.parts) == (1,)
    outside = z - reference.mode_product(z, factors[0] @ factors[0].T, 0)
    left_out = reference.tangent_projection(core, factors, outside)
    assert relative_error(space.to_tensor(tangent)[0], expected - left_out) <= 1e-13


@on_every_device
@laws
@given(case=tucker_cases())
def test_coordinates_in_larger_bases_give_the_same_projection(
    device: str, case: TuckerCase
) -> None:
    core = case.core(device)
    sizes = [min(n, r + 1) for n, r in zip(case.shape, case.ranks, strict=True)]
    bases = TuckerCase(case.shape, tuple(sizes), case.dtype, case.seed).factors(device)
    projections = [
        None if b == r else orthonormal(b, r, case.seed).to(device, case.dtype)
        for b, r in zip(sizes, case.ranks, strict=True)
    ]
    factors = [b if p is None else b @ p for b, p in zip(bases, projections, strict=True)]
    coordinates = gaussian(sizes, case.seed, case.dtype, device)
    space = single(core, factors)
    one = [None if p is None else p[None] for p in projections]
    found = space.project(coordinates[None], [b[None] for b in bases], one)
    expected = space.project(multi_mode_product(coordinates, bases)[None])
    error = relative_error(space.to_tensor(found), space.to_tensor(expected))
    assert error <= rounding(case.dtype)


@on_every_device
@laws
@given(case=tucker_cases())
def test_basis_step_is_the_k_step_of_the_moved_point(device: str, case: TuckerCase) -> None:
    core, factors = case.core(device), case.factors(device)
    space = single(core, factors)
    tangent = space.project(0.3 * case.tensor(0, device)[None])
    moved = multi_mode_product(core, factors) - space.to_tensor(tangent)[0]
    bases = [double(u) for u in factors]
    for mode in space.moving_modes:
        others = reference.kronecker([u for j, u in enumerate(bases) if j != mode])
        rows = reference.unfold(double(core), mode)
        expected = reference.unfold(double(moved), mode) @ others
        expected = expected @ torch.linalg.pinv(rows) @ rows  # K Q^T, whatever the signs in Q
        found = space.basis_step(tangent, mode)[0]
        error = relative_error(found @ found.mT, expected @ expected.T)
        assert error <= rounding(case.dtype) * condition(core)


@on_every_device
@laws
@given(case=tucker_cases())
def test_a_projected_step_is_the_projection_of_the_moved_point_and_of_its_velocity(
    device: str, case: TuckerCase
) -> None:
    core, factors = case.core(device), case.factors(device)
    space = single(core, factors)
    tangent = space.project(case.tensor(0, device)[None])
    bases = [
        orthonormal(*u.shape, case.seed + mode).to(u) if mode in space.moving_modes else u
        for mode, u in enumerate(factors)
    ]
    stacked = [
        v[None] if mode in space.moving_modes else space.factors[mode]
        for mode, v in enumerate(bases)
    ]
    transport = Transport(space, stacked, space.layout)
    cut = transport.cut(tangent)
    target = TangentSpace(transport.point() - 0.3 * cut.core, stacked, space.layout)
    transported = transport.vector(tangent, cut, target)
    velocity = double(space.to_tensor(tangent)[0])
    moved = double(multi_mode_product(core, factors)) - 0.3 * velocity
    projectors = [double(u @ u.mT) for u in bases]
    size, allowed = float(moved.norm() + velocity.norm()), rounding(case.dtype)
    found = double(multi_mode_product(target.core[0], bases))
    assert (found - reference.multi_product(moved, projectors)).norm() <= allowed * size
    expected = twin(target.core[0], bases, velocity)
    error = (double(target.to_tensor(transported)[0]) - expected).norm()
    assert error <= allowed * condition(target.core[0]) * size


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1e-5, 1e-7, 1e-12, 1e-15, 1e-30, 0.0])
@pytest.mark.parametrize(("ranks", "mode"), [((3, 3), 0), ((2, 3, 3), 1), ((2, 2, 2, 3), 3)])
def test_ill_conditioned_cores_give_bounded_gradients(
    device: str, dtype: torch.dtype, value: float, ranks: tuple[int, ...], mode: int
) -> None:
    case = TuckerCase((7,) * len(ranks), ranks, dtype, 0)
    core = core_with_smallest_value(value, ranks, mode).to(device, dtype)
    factors, z = case.factors(device), case.tensor(0, device)
    gradient = riemannian_gradient(core, factors, z)
    for basis, part in zip(factors, gradient.parts.values(), strict=True):
        assert (basis.mT @ part).norm() <= rounding(dtype) * z.norm()
    # An orthogonal projection never lengthens; the last value carries a relative error of eps.
    assert norm(gradient) <= 1.25 * z.norm()
    projected = single(core, factors).project(z[None])
    assert norm(projected) <= (1 + rounding(dtype)) * z.norm()


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_singular_value_still_counts(device: str, dtype: torch.dtype) -> None:
    case = TuckerCase((7, 6, 5), (3, 3, 3), dtype, 0)
    value = 2e4 * torch.finfo(dtype).eps
    core = core_with_smallest_value(value, case.ranks, 0).to(device, dtype)
    factors, z = case.factors(device), case.tensor(0, device)
    dense = single(core, factors).to_tensor(riemannian_gradient(core, factors, z))[0]
    assert relative_error(dense, twin(core, factors, z)) <= rounding(dtype) / value


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vanished_singular_value_leaves_the_other_directions_exact(
    device: str, dtype: torch.dtype
) -> None:
    case = TuckerCase((7, 6, 5), (3, 3, 3), dtype, 0)
    core = core_with_smallest_value(0.0, case.ranks, 0)
    core[0] = core[1] = core[2]  # exactly dependent rows, in any precision
    core = core.to(device, dtype)
    factors, z = case.factors(device), case.tensor(0, device)
    dense = single(core, factors).to_tensor(riemannian_gradient(core, factors, z))[0]
    expected = twin(core, factors, z)
    other = twin(core, factors, dense)  # the projection without the direction that vanished
    assert relative_error(other, expected) <= rounding(dtype)
    # A QR factorisation in float64 takes the direction for one of up to eps ||C||.
    left = rounding(dtype) if dtype == torch.float32 else VANISHED
    assert relative_error(dense, expected) <= left


@on_every_device
def test_a_zero_core_gives_the_gradient_of_the_core_alone(device: str) -> None:
    case = TuckerCase((5, 4, 3), (2, 2, 2), torch.float32, 0)
    core, factors, z = case.core(device) * 0, case.factors(device), case.tensor(0, device)
    gradient = riemannian_gradient(core, factors, z)
    assert not any(part.any() for part in gradient.parts.values())
    expected = multi_mode_product(z, factors, transpose=True)
    assert relative_error(gradient.core[0], expected) <= rounding(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_a_zero_core_no_basis_moves(dtype: torch.dtype) -> None:
    factors = [orthonormal(6, r, r).to(dtype) for r in (2, 3, 2)]
    space = single(torch.zeros(2, 3, 2, dtype=dtype), factors)
    assert space.moving_modes == (0, 1, 2)
    gradients = {mode: torch.ones(1, 6, r, dtype=dtype) for mode, r in enumerate((2, 3, 2))}
    gradient = space.gradient(torch.ones(1, 2, 3, 2, dtype=dtype), gradients)
    moved = TangentVector(gradient.core, {m: torch.zeros_like(p) for m, p in gradients.items()})
    for mode in space.moving_modes:
        assert not space.rows(mode).any()
        basis, step = space.factor(mode), space.basis_step(moved, mode).double()
        # U_i times a number: it spans what it did.
        assert relative_error(step / step.norm(dim=1, keepdim=True), basis) <= rounding(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [0.5, 1, 1.02])
def test_a_subnormal_core_gives_a_finite_gradient(dtype: torch.dtype, power: float) -> None:
    tiny = torch.finfo(dtype).tiny
    core = torch.full((2, 2, 2), tiny**power, dtype=dtype)
    assert core.any()
    factors = [torch.eye(4, dtype=dtype)[:, :2]] * 3
    space = single(core, factors)
    ones = {mode: torch.ones(1, 4, 2, dtype=dtype) for mode in range(3)}
    gradient = space.gradient(torch.ones(1, 2, 2, 2, dtype=dtype), ones)
    for mode, part in gradient.parts.items():
        assert torch.isfinite(part).all()
        assert all(torch.isfinite(tensor).all() for tensor in space.factorizations[mode])


def test_ranks_that_no_core_can_have() -> None:
    factors = [torch.eye(6)[:, :5], *[torch.eye(4)[:, :2]] * 2]
    with pytest.raises(RankError, match="rank 5 of mode 0 is larger than the product"):
        single(torch.ones(5, 2, 2), factors)


def test_a_full_basis_has_any_rank_beside_a_member_that_moves() -> None:
    full = TuckerCase((6, 2, 2), (6, 2, 2), torch.float64, 0)
    moving = TuckerCase((6, 3, 3), (4, 2, 2), torch.float64, 1)
    space = TangentSpace(*stack([full.tucker(), moving.tucker()]))
    z = [full.tensor(0), moving.tensor(0)]
    dense = space.to_tensor(space.project(padded(z)))
    expected = [z[0], twin(moving.core(), moving.factors(), z[1])]
    assert stack_error(dense, expected) <= 1e-12


def test_a_mode_that_is_not_factorised_has_no_factor() -> None:
    space = single(gaussian((2, 2, 3), 0), [orthonormal(5, 2, 0), orthonormal(4, 2, 1), None])
    with pytest.raises(RankError, match="got 2, which is not factorised"):
        space.factor(2)


# --- the factorisation of a core ----------------------------------------------------------------


def damped(values: Tensor, delta: float) -> Tensor:
    return values.square() / (values.square() + delta)


def slope(values: Tensor, delta: float) -> Tensor:
    """Derivative of `damped`: by how much an error of a singular value changes it."""
    return 2 * values * delta / (values.square() + delta).square()


VANISHED = 1 / 64
"""What rounding in float64 may leave of a direction without a singular value, (1/8)^2."""

VALUES = (1e3, 300.0, 64.0, 16.0, 8.0, 3.0, 1.0, 0.1, 1e-3, 0.0)
"""Smallest singular values, in units of eps ||C||."""


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(("ranks", "mode"), [((3, 3), 0), ((2, 3, 3), 1), ((2, 2, 2, 3), 3)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e9])
def test_damping_is_what_the_docstring_says(
    device: str, dtype: torch.dtype, value: float, ranks: tuple[int, ...], mode: int, size: float
) -> None:
    eps = torch.finfo(dtype).eps
    core = core_with_smallest_value(value * eps, ranks, mode)
    core = (core / core.norm() * size).to(device, dtype)
    lower, inverse, rows = (t[0] for t in factorize_core(core[None], mode))
    assert {t.dtype for t in (lower, inverse, rows)} == {dtype}
    matrix, delta = reference.unfold(double(core), mode), damping(core)
    lower, inverse, rows = double(lower), double(inverse), double(rows)

    assert torch.equal(lower, lower.tril())
    assert (lower.diagonal() > 0).all()
    assert relative_error(lower @ rows, matrix) <= rounding(dtype)
    gram = matrix @ matrix.T + delta * torch.eye(len(matrix)).double()
    assert relative_error(lower @ lower.T, gram) <= rounding(dtype)
    largest = float(torch.linalg.matrix_norm(inverse, 2))
    assert largest <= 1 / math.sqrt(delta) * (1 + 1e-3)

    values = torch.linalg.svdvals(matrix)
    found = torch.linalg.eigvalsh(rows @ rows.T).flip(0)
    # A QR factorisation in float64 knows sigma to eps ||C||, a Gram matrix sigma^2 to eps ||C||^2.
    exact = torch.finfo(torch.float64).eps
    unsure = 4 * eps * size * slope(values, delta)
    if dtype == torch.float32:
        unsure = 4 * exact * size**2 * delta / (values.square() + delta).square()
    assert ((found - damped(values, delta)).abs() <= rounding(dtype, 10) + unsure).all()
    assert (found <= 1 + rounding(dtype, 10)).all()


@pytest.mark.parametrize("value", VALUES)
def test_damping_in_float64_is_exact_where_the_singular_values_are(value: float) -> None:
    eps = torch.finfo(torch.float64).eps
    core = torch.zeros(1, 3, 4, dtype=torch.float64)
    core[0, 0, 2], core[0, 1, 0], core[0, 2, 3] = 1.0, -0.5, value * eps
    rows = factorize_core(core, 0).rows[0]
    values = torch.tensor([1.0, 0.5, value * eps], dtype=torch.float64)
    expected = damped(values, damping(core[0])).diag()
    assert relative_error(rows @ rows.T, expected) <= 1e-14
    assert (rows @ rows.T)[2, 2] == pytest.approx(float(expected[2, 2]), rel=1e-12, abs=1e-40)


@on_every_device
@pytest.mark.parametrize("value", VALUES)
def test_the_gradient_at_an_ill_conditioned_core_is_the_damped_projection(
    device: str, value: float
) -> None:
    case = TuckerCase((7, 6, 5), (3, 3, 3), torch.float32, 0)
    core = core_with_smallest_value(value * torch.finfo(case.dtype).eps, case.ranks, 0)
    core = core.to(device, case.dtype)
    factors, z = case.factors(device), case.tensor(0, device)
    space = single(core, factors)
    exact = [double(u).requires_grad_() for u in factors]
    loss = (multi_mode_product(double(core), exact) * double(z)).sum()
    gradients = torch.autograd.grad(loss, exact)  # without the noise that S^-T makes larger
    by_mode = {mode: gradient[None].to(core) for mode, gradient in enumerate(gradients)}
    core_gradient = multi_mode_product(z, factors, transpose=True)[None]
    found = space.to_tensor(space.gradient(core_gradient, by_mode))[0]
    expected = twin(core, factors, z, damping(core))
    # grad_{U_i} L itself is rounded to float32, and S^-T is at most 1 / (8 eps ||C||).
    assert relative_error(found, expected) <= 0.1
    projected = space.to_tensor(space.project(z[None]))[0]
    assert relative_error(projected, expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e-10, 1e10])
def test_dependent_rows_leave_the_other_directions_exact(dtype: torch.dtype, size: float) -> None:
    core = (gaussian((4, 3, 3), 0) * size).to(dtype)
    core[1], core[3] = core[0], -2 * core[0]
    rows = double(factorize_core(core[None], 0).rows[0])
    matrix = reference.unfold(double(core), 0)
    expected = torch.linalg.pinv(matrix, rtol=1e-5 if dtype == torch.float32 else 1e-12) @ matrix
    found = rows.T @ rows
    assert relative_error(expected @ found @ expected, expected) <= rounding(dtype)
    left = rounding(dtype) if dtype == torch.float32 else VANISHED
    assert relative_error(found, expected) <= left


# --- stacks of members of different sizes -------------------------------------------------------


Mixture = tuple[list[TuckerCase], tuple[int, ...]]


def tuckers(mixture: Mixture, device: str = "cpu") -> list[Tucker]:
    cases, modes = mixture
    return [case.tucker(device, modes) for case in cases]


def worst(mixture: Mixture) -> float:
    return rounding(mixture[0][0].dtype) * max(condition(case.core()) for case in mixture[0])


@on_every_device
@stack_laws
@given(mixture=mixtures(), vanishing=st.integers(0, 4))
def test_a_core_is_factorised_as_it_is_alone(
    device: str, mixture: tuple[list[TuckerCase], tuple[int, ...]], vanishing: int
) -> None:
    cases, modes = mixture
    members = [case.tucker(device, modes) for case in cases]
    members = [(c * 0, f) if n == vanishing else (c, f) for n, (c, f) in enumerate(members)]
    core, _, layout = stack(members)
    for mode in layout.moving:
        found = factorize_core(core, mode, layout.padding(mode))
        alone = [factorize_core(member[None], mode) for member, _ in members]
        allowed = worst((cases, modes))
        for number, case in enumerate(cases):
            rank = case.ranks[mode]
            for blocks, expected in zip(found[:2], alone[number][:2], strict=True):
                block = blocks[number]
                assert relative_error(block[:rank, :rank], expected[0]) <= allowed
                assert not block[:rank, rank:].any()
                assert not block[rank:, :rank].any()
        ranks = [case.ranks for case in cases]
        rows = [fold(of.rows[0], mode, r) for of, r in zip(alone, ranks, strict=True)]
        assert stack_error(fold(found.rows, mode, layout.columns), rows) <= allowed


def same_parts(together: TangentSpace, found: TangentVector, alone: list[TangentVector]) -> float:
    """Largest relative error of a part; that of a member which does not move is zero."""
    errors = [0.0]
    for mode in together.moving_modes:
        parts = []
        for number, vector in enumerate(alone):
            size, rank = (of[number][mode] for of in (together.layout.sizes, together.layout.ranks))
            part = vector.parts.get(mode)
            parts.append(found.core.new_zeros(size, rank) if part is None else part[0])
            assert part is not None or not found.parts[mode][number].any()
        errors.append(stack_error(found.parts[mode], parts))
    return max(errors)


@on_every_device
@stack_laws
@given(mixture=mixtures())
def test_gradients_in_a_stack_are_those_of_its_members(device: str, mixture: Mixture) -> None:
    members = tuckers(mixture, device)
    together = TangentSpace(*stack(members))
    sizes, ranks = together.layout.sizes, together.layout.ranks
    cores = [gaussian(r, 7 + n).to(members[0][0]) for n, r in enumerate(ranks)]
    bases = [
        {m: gaussian((n[m], r[m]), 70 + m).to(cores[0]) for m in together.moving_modes}
        for n, r in zip(sizes, ranks, strict=True)
    ]
    stacked = {m: padded([of[m] for of in bases]) for m in together.moving_modes}
    found = together.gradient(padded(cores), stacked)
    alone = []
    for member, core, own in zip(members, cores, bases, strict=True):
        space = single(*member)
        alone.append(space.gradient(core[None], {m: own[m][None] for m in space.moving_modes}))
    assert same_parts(together, found, alone) <= worst(mixture)
    assert stack_error(found.core, [vector.core[0] for vector in alone]) == 0
    lengths = torch.cat([vector.squared_norms() for vector in alone])
    assert relative_error(found.squared_norms(), lengths) <= worst(mixture)


@on_every_device
@stack_laws
@given(mixture=mixtures())
def test_projections_in_a_stack_are_those_of_its_members(device: str, mixture: Mixture) -> None:
    members = tuckers(mixture, device)
    together = TangentSpace(*stack(members))
    tensors = [case.tensor(0, device) for case in mixture[0]]
    found = together.project(padded(tensors))
    spaces = [single(*member) for member in members]
    alone = [space.project(z[None]) for space, z in zip(spaces, tensors, strict=True)]
    assert same_parts(together, found, alone) <= worst(mixture)
    assert stack_error(found.core, [vector.core[0] for vector in alone]) <= worst(mixture)

    dense = [s.to_tensor(vector)[0] for s, vector in zip(spaces, alone, strict=True)]
    assert stack_error(together.to_tensor(found), dense) <= worst(mixture)
    for mode in together.moving_modes:
        step = together.basis_step(found, mode)
        for number, (space, vector) in enumerate(zip(spaces, alone, strict=True)):
            true = step[number, : mixture[0][number].shape[mode], : mixture[0][number].ranks[mode]]
            if mode in space.moving_modes:
                expected = space.basis_step(vector, mode)[0]
                assert relative_error(true, expected) <= worst(mixture)
        sizes = [torch.ones(c.shape[mode], c.ranks[mode]) for c in mixture[0]]
        assert not behind(step, [size.to(step) for size in sizes]).any()


@on_every_device
@stack_laws
@given(mixture=mixtures())
def test_embeddings_in_a_stack_are_those_of_its_members(device: str, mixture: Mixture) -> None:
    members = tuckers(mixture, device)
    together = TangentSpace(*stack(members))
    layout = together.layout
    found = together.project(padded([case.tensor(0, device) for case in mixture[0]]))
    new = {
        mode: new_directions(together.factor(mode), part, layout.spare(mode))[0]
        for mode, part in found.parts.items()
    }
    bases = [
        torch.cat([u, new[mode]], dim=2) if mode in new else u
        for mode, u in enumerate(together.factors)
    ]
    embedded = multi_mode_product(together.embed(found, new), bases)
    dense = []
    for member, case in zip(members, mixture[0], strict=True):
        space = single(*member)
        dense.append(space.to_tensor(space.project(case.tensor(0, device)[None]))[0])
    assert stack_error(embedded, dense) <= worst(mixture)
