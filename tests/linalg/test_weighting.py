"""Weighted truncation equals its twin, and does for inputs what it says."""

import pytest
import torch
from torch import Tensor

from reference.cases import gaussian, relative_error
from reference.weighting import truncate_weighted as twin
from tdlrt.linalg import orthonormality_error, shrunk_root, truncate_weighted
from tdlrt.ranks import RelativeTolerance, initial_cutoff

SHAPES = {"linear": (9, 7), "conv1d": (8, 6, 3), "conv2d": (7, 6, 3, 2)}


def covariance(size: int) -> Tensor:
    """Second moments of inputs that mostly lie in a few directions."""
    rows = gaussian((200, size), 5) * torch.linspace(0.01, 3, size)
    rows = rows @ torch.linalg.qr(gaussian((size, size), 6))[0]
    return rows.T @ rows / len(rows)


def truncated(weight: Tensor, sigma: Tensor, spec: object, modes: tuple[int, ...]):
    return truncate_weighted(weight, sigma, 1, initial_cutoff(spec, weight.shape), modes)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spec", [0.5, RelativeTolerance(0.3), "full"])
@pytest.mark.parametrize("order", ["all", "channels"])
def test_it_is_its_twin(shape, spec, order) -> None:
    weight, sigma = gaussian(shape, 1), covariance(shape[1])
    modes = tuple(range(len(shape) if order == "all" else 2))
    found = truncated(weight, sigma, spec, modes)
    if isinstance(spec, RelativeTolerance):
        expected = twin(weight, sigma, tau=spec.tau, modes=modes)
    else:
        expected = twin(weight, sigma, ranks=found.ranks, modes=modes)
    assert relative_error(found.to_tensor(), expected) < 1e-10
    assert all(orthonormality_error(factor) < 1e-13 for factor in found.factors)
    if spec == "full":
        assert relative_error(found.to_tensor(), weight) < 1e-12


@pytest.mark.parametrize("tau", [0.05, 0.3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_tolerance_bounds_the_error_of_the_outputs(shape, tau) -> None:
    weight, sigma = gaussian(shape, 1), covariance(shape[1])
    found = truncated(weight, sigma, RelativeTolerance(tau), tuple(range(len(shape))))
    root = shrunk_root(sigma)[0]

    def size(tensor: Tensor) -> Tensor:
        return torch.tensordot(tensor, root, ([1], [0])).norm()

    assert size(found.to_tensor() - weight) <= tau * size(weight)
    assert tau < 0.3 or found.ranks != shape


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_without_preference_it_is_the_plain_truncation(scale) -> None:
    weight = gaussian((9, 7), 1)
    found = truncated(weight, scale * torch.eye(7).double(), 3, (0, 1))
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    assert relative_error(found.to_tensor(), left[:, :3] * values[:3] @ right[:3]) < 1e-12


def test_the_root_squared_is_the_shrunk_covariance() -> None:
    sigma = covariance(6)
    root, inverse = shrunk_root(sigma)
    expected = 0.99 * sigma + 0.01 * sigma.trace() / 6 * torch.eye(6).double()
    assert relative_error(root @ root, expected) < 1e-12
    assert relative_error(root @ inverse, torch.eye(6).double()) < 1e-12
