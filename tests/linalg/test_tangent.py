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
    relative_error,
    rounding,
    tucker_cases,
)
from tdlrt.linalg import TangentSpace, TangentVector, multi_mode_product, new_directions


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


def test_an_identity_may_stand_for_none_and_modes_may_rest() -> None:
    core, z = gaussian((2, 2, 3), 0), gaussian((5, 4, 3), 1)
    first, second = (reference.truncate(gaussian((n, 2), n), 0)[1][0] for n in (5, 4))
    identity = torch.eye(3, dtype=torch.float64)
    absent = TangentSpace(core, [first, second, None])
    present = TangentSpace(core, [first, second, identity])
    expected = twin(core, [first, second, identity], z)
    assert absent.moving_modes == present.moving_modes == (0, 1)
    for space in (absent, present):
        assert relative_error(space.to_tensor(space.project(z)), expected) <= 1e-13

    resting = TangentSpace(core, [first, second, None], modes=(1,))
    tangent = resting.project(z)
    assert resting.moving_modes == (1,)
    assert not tangent.factors[0].any()
    outside = z - reference.mode_product(z, first @ first.T, 0)
    left_out = reference.tangent_projection(core, [first, second, identity], outside)
    assert relative_error(resting.to_tensor(tangent), expected - left_out) <= 1e-13


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
