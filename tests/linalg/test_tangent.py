import pytest
import torch
from hypothesis import given
from torch import Tensor

import reference
from reference.cases import (
    TuckerCase,
    gaussian,
    laws,
    on_every_device,
    orthonormal,
    relative_error,
    rounding,
    tucker_cases,
)
from tdlrt.errors import RankError
from tdlrt.linalg import TangentSpace, TangentVector, Transport, multi_mode_product, new_directions


def twin(core: Tensor, factors: list[Tensor], z: Tensor) -> Tensor:
    as_double = reference.as_double
    return reference.tangent_projection(
        as_double(core), [as_double(u) for u in factors], as_double(z)
    )


def riemannian_gradient(core: Tensor, factors: list[Tensor], z: Tensor) -> TangentVector:
    """The projection of Z by way of the gradients of <Z, W> that autograd gives for C and U_i."""
    leaves = [tensor.clone().requires_grad_() for tensor in (core, *factors)]
    loss = (multi_mode_product(leaves[0], leaves[1:]) * z).sum()
    core_gradient, *factor_gradients = torch.autograd.grad(loss, leaves)
    return TangentSpace(core, factors).gradient(core_gradient, factor_gradients)


def condition(core: Tensor) -> float:
    """Largest condition number of an unfolding of the core."""
    unfoldings = (reference.unfold(reference.as_double(core), i) for i in range(core.ndim))
    return max(float(torch.linalg.cond(matrix)) for matrix in unfoldings)


def core_with_smallest_value(value: float, ranks: tuple[int, ...], mode: int) -> Tensor:
    """A random core whose unfolding in one mode has singular values from 1 down to ``value``."""
    left, _, right = torch.linalg.svd(
        reference.unfold(gaussian(ranks, 0), mode), full_matrices=False
    )
    values = torch.linspace(1, 0.5, len(left), dtype=torch.float64)
    values[-1] = value
    return reference.fold(left @ values.diag() @ right, mode, ranks)


@on_every_device
@laws
@given(case=tucker_cases())
def test_projection_equals_its_twin(device: str, case: TuckerCase) -> None:
    core, factors, z = case.core(device), case.factors(device), case.tensor(0, device)
    space = TangentSpace(core, factors)
    projected = space.project(z)
    dense = space.to_tensor(projected)
    assert relative_error(dense, twin(core, factors, z)) <= rounding(case.dtype) * condition(core)
    assert relative_error(projected.norm(), dense.norm()) <= rounding(case.dtype)


@on_every_device
@laws
@given(case=tucker_cases())
def test_projection_is_idempotent_and_self_adjoint(device: str, case: TuckerCase) -> None:
    space = TangentSpace(case.core(device), case.factors(device))
    a, b = case.tensor(0, device), case.tensor(1, device)
    projected_a, projected_b = (space.to_tensor(space.project(z)) for z in (a, b))
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
    dense = TangentSpace(core, factors).to_tensor(riemannian_gradient(core, factors, z))
    assert relative_error(dense, twin(core, factors, z)) <= rounding(case.dtype) * condition(core)


@on_every_device
@laws
@given(case=tucker_cases())
def test_basis_parts_are_orthogonal_to_the_bases(device: str, case: TuckerCase) -> None:
    core, factors, z = case.core(device), case.factors(device), case.tensor(0, device)
    parts = TangentSpace(core, factors).project(z).factors
    for basis, part in zip(factors, parts, strict=True):
        assert (basis.mT @ part).norm() <= rounding(case.dtype) * z.norm()


@on_every_device
@laws
@given(case=tucker_cases())
def test_embedding_in_augmented_bases_changes_nothing(device: str, case: TuckerCase) -> None:
    factors = case.factors(device)
    space = TangentSpace(case.core(device), factors)
    tangent = space.project(case.tensor(0, device))
    new = [new_directions(u, part) for u, part in zip(factors, tangent.factors, strict=True)]
    bases = [torch.cat(pair, dim=1) for pair in zip(factors, new, strict=True)]
    embedded = multi_mode_product(space.embed(tangent, new), bases)
    assert relative_error(embedded, space.to_tensor(tangent)) <= rounding(case.dtype)


def test_only_the_chosen_modes_move_and_a_full_basis_never_does() -> None:
    core, z = gaussian((2, 2, 3), 0), gaussian((5, 4, 3), 1)
    factors = [orthonormal(n, r, n) for n, r in zip(z.shape, core.shape, strict=True)]
    expected = twin(core, factors, z)
    assert TangentSpace(core, factors).moving_modes == (0, 1)

    space = TangentSpace(core, factors, modes=(1,))
    tangent = space.project(z)
    assert space.moving_modes == (1,)
    assert not tangent.factors[0].any()
    outside = z - reference.mode_product(z, factors[0] @ factors[0].T, 0)
    left_out = reference.tangent_projection(core, factors, outside)
    assert relative_error(space.to_tensor(tangent), expected - left_out) <= 1e-13


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
    space = TangentSpace(core, factors)
    found = space.to_tensor(space.project(coordinates, bases, projections))
    expected = space.to_tensor(space.project(multi_mode_product(coordinates, bases)))
    assert relative_error(found, expected) <= rounding(case.dtype)


@on_every_device
@laws
@given(case=tucker_cases())
def test_basis_step_is_the_k_step_of_the_moved_point(device: str, case: TuckerCase) -> None:
    core, factors = case.core(device), case.factors(device)
    space = TangentSpace(core, factors)
    tangent = space.project(case.tensor(0, device))
    moved = multi_mode_product(core, factors) - 0.3 * space.to_tensor(tangent)
    double, bases = reference.as_double(core), [reference.as_double(u) for u in factors]
    for mode in space.moving_modes:
        others = reference.kronecker([u for j, u in enumerate(bases) if j != mode])
        rows = reference.unfold(double, mode)
        expected = reference.unfold(reference.as_double(moved), mode) @ others
        expected = expected @ torch.linalg.pinv(rows) @ rows  # K Q^T, whatever the signs in Q
        found = space.basis_step(tangent, 0.3, mode)
        error = relative_error(found @ found.mT, expected @ expected.T)
        assert error <= rounding(case.dtype) * condition(core)


@on_every_device
@laws
@given(case=tucker_cases())
def test_a_projected_step_is_the_projection_of_the_moved_point_and_of_its_velocity(
    device: str, case: TuckerCase
) -> None:
    core, factors = case.core(device), case.factors(device)
    space = TangentSpace(core, factors)
    tangent = space.project(case.tensor(0, device))
    bases = [
        orthonormal(*u.shape, case.seed + mode).to(u) if mode in space.moving_modes else u
        for mode, u in enumerate(factors)
    ]
    transport = Transport(space, bases)
    cut = transport.cut(tangent)
    target = TangentSpace(transport.point() - 0.3 * cut.core, bases)
    transported = transport.vector(tangent, cut, target)
    velocity = reference.as_double(space.to_tensor(tangent))
    moved = reference.as_double(multi_mode_product(core, factors)) - 0.3 * velocity
    projectors = [reference.as_double(u @ u.mT) for u in bases]
    size, allowed = float(moved.norm() + velocity.norm()), rounding(case.dtype)
    found = reference.as_double(multi_mode_product(target.core, target.factors))
    assert (found - reference.multi_product(moved, projectors)).norm() <= allowed * size
    expected = twin(target.core, bases, velocity)
    error = (reference.as_double(target.to_tensor(transported)) - expected).norm()
    assert error <= allowed * condition(target.core) * size


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
    # An orthogonal projection never lengthens; the last value carries a relative error of eps.
    assert gradient.norm() <= 1.25 * z.norm()
    assert TangentSpace(core, factors).project(z).norm() <= (1 + rounding(dtype)) * z.norm()


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_singular_value_still_counts(device: str, dtype: torch.dtype) -> None:
    case = TuckerCase((7, 6, 5), (3, 3, 3), dtype, 0)
    value = 2e4 * torch.finfo(dtype).eps
    core = core_with_smallest_value(value, case.ranks, 0).to(device, dtype)
    factors, z = case.factors(device), case.tensor(0, device)
    dense = TangentSpace(core, factors).to_tensor(riemannian_gradient(core, factors, z))
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
    dense = TangentSpace(core, factors).to_tensor(riemannian_gradient(core, factors, z))
    assert relative_error(dense, twin(core, factors, z)) <= rounding(dtype)


@on_every_device
def test_a_zero_core_gives_the_gradient_of_the_core_alone(device: str) -> None:
    case = TuckerCase((5, 4, 3), (2, 2, 2), torch.float32, 0)
    core, factors, z = case.core(device) * 0, case.factors(device), case.tensor(0, device)
    gradient = riemannian_gradient(core, factors, z)
    assert not any(part.any() for part in gradient.factors)
    expected = multi_mode_product(z, factors, transpose=True)
    assert relative_error(gradient.core, expected) <= rounding(torch.float32)


def test_at_a_zero_core_no_basis_moves() -> None:
    space = TangentSpace(torch.zeros(2, 3, 2), [orthonormal(6, r, r).float() for r in (2, 3, 2)])
    assert space.moving_modes == (0, 1, 2)
    space.settle()
    assert space.moving_modes == ()


def test_a_subnormal_core_gives_a_finite_gradient():
    core = torch.full((2, 2, 2), 1e-40)
    factors = [torch.eye(4)[:, :2]] * 3
    gradient = TangentSpace(core, factors).gradient(torch.ones(2, 2, 2), [torch.ones(4, 2)] * 3)
    assert all(torch.isfinite(part).all() for part in gradient.factors)


def test_ranks_that_no_core_can_have():
    with pytest.raises(RankError, match="rank 5 of mode 0 is larger than the product"):
        TangentSpace(torch.ones(5, 2, 2), [torch.eye(6)[:, :5], *[torch.eye(4)[:, :2]] * 2])


def test_a_singular_core_survives_a_failing_svd(monkeypatch):
    svd, calls = torch.linalg.svd, []

    def fails_once(matrix):
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError
        return svd(matrix)

    core = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)) + 0.0
    core[1, 0] = 2.0
    factors = [torch.eye(4, dtype=torch.float64)[:, :2]] * 2
    gradients = [gaussian((4, 2), seed) for seed in (1, 2)]
    expected = TangentSpace(core, factors).gradient(core, gradients)
    monkeypatch.setattr(torch.linalg, "svd", fails_once)
    actual = TangentSpace(core, factors).gradient(core, gradients)
    assert len(calls) > 1
    for one, other in zip(actual.factors, expected.factors, strict=True):
        assert torch.allclose(one, other)
