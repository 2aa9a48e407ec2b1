import math
from typing import Any

import pytest
import torch
from torch import nn

from tdlrt.errors import IntegratorStateError, NonFiniteError, RankError, UnsupportedLayerError
from tdlrt.linalg import TuckerTensor
from tdlrt.nn import TuckerConv1d, TuckerConv2d, TuckerConv3d, TuckerLinear


class Subclass(nn.Conv2d):
    pass


@pytest.mark.parametrize("kind", [TuckerConv1d, TuckerConv2d, TuckerConv3d])
def test_groups_are_refused(kind: Any) -> None:
    with pytest.raises(UnsupportedLayerError, match="groups: got 2, expected 1"):
        kind(4, 4, 3, groups=2)
    with pytest.raises(UnsupportedLayerError, match="groups: got 4, expected 1"):
        kind.from_conv(kind.plain(4, 4, 3, groups=4))


@pytest.mark.parametrize("shape", [(), (4,), (4, 4), (1, 1, 4, 4, 4)])
def test_an_input_of_other_dimensions_is_refused_as_torch_does(shape: Any) -> None:
    for layer in (TuckerConv2d(4, 4, 3, rank=2), nn.Conv2d(4, 4, 3)):
        with pytest.raises(RuntimeError, match=r"Expected 3D \(unbatched\) or 4D"):
            layer(torch.zeros(shape))


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Conv1d(4, 4, 3), "Conv1d"),
        (nn.Linear(4, 4), "Linear"),
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d"),
        (Subclass(4, 4, 3), "Subclass"),
        (nn.ReLU(), "ReLU"),
    ],
)
def test_only_the_layer_itself_is_converted(layer: nn.Module, name: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=rf"got {name}, expected torch\.nn\.Conv2d"):
        TuckerConv2d.from_conv(layer)


@pytest.mark.parametrize("path", ["three_stage", "fold_in", "fold_out", "dense", "auto"])
@pytest.mark.parametrize("shape", [(), (23,), (2, 48), (2, 3, 12)])
def test_an_input_of_another_width_is_refused_with_the_width_of_the_layer(
    shape: Any, path: Any
) -> None:
    layer = TuckerLinear(24, 6, rank=2, reshape=((6,), (2, 3, 4)))
    layer.path = path
    with pytest.raises(RuntimeError, match=r"input: got one of shape .*, expected \(\.\.\., 24\)"):
        layer(torch.zeros(shape))
    assert layer(torch.zeros(2, 3, 24)).shape == (2, 3, 6)


def test_only_a_linear_layer_is_converted_to_one() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"got Conv2d, expected torch\.nn\.Linear"):
        TuckerLinear.from_linear(nn.Conv2d(4, 4, 3))


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "got 0"),
        (-3, "got -3"),
        (0.0, "got the fraction 0.0"),
        (1.5, "got the fraction 1.5"),
        (-0.5, "got the fraction -0.5"),
        (math.nan, "got the fraction nan"),
        (True, "got True"),
        (None, "got None"),
        ("half", "got 'half'"),
        ((2, 2), "got 2 ranks"),
        ((2, 2, 2, 2, 2), "got 5 ranks"),
        ((6, 2, 2, 2), "got 6 for mode 0 of size 5, expected an int from 1 to 5"),
        ((2, 2, 0, 2), "got 0 for mode 2 of size 3"),
        ((2, 2, 2, 3), "got 3 for mode 3 of size 2"),
        ((2.0, 2, 2, 2), "got 2.0 for mode 0"),
        ((True, 2, 2, 2), "got True for mode 0"),
    ],
)
def test_ranks_outside_their_range_are_refused(rank: Any, message: str) -> None:
    with pytest.raises(RankError, match=f"rank: {message}"):
        TuckerConv2d(6, 5, (3, 2), rank=rank)
    with pytest.raises(RankError, match=f"rank: {message}"):
        TuckerConv2d.from_conv(nn.Conv2d(6, 5, (3, 2)), rank=rank)


@pytest.mark.parametrize("rank", [0, 1.5, (2,), (6, 2), "none"])
def test_ranks_of_a_linear_layer_are_checked_too(rank: Any) -> None:
    with pytest.raises(RankError, match="rank: got"):
        TuckerLinear(6, 5, rank=rank)


def test_modes_are_all_or_channels() -> None:
    with pytest.raises(RankError, match="modes: got 'kernel', expected 'all' or 'channels'"):
        TuckerConv2d(6, 5, 3, modes="kernel")


@pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan, "1"])
def test_init_scale_is_a_positive_number(scale: Any) -> None:
    with pytest.raises(RankError, match=f"init_scale: got {scale!r}, expected a positive number"):
        TuckerConv2d(6, 5, 3, init_scale=scale)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight[1, 2] = value
    with pytest.raises(NonFiniteError, match="weight: got NaN or infinite"):
        TuckerLinear.from_linear(linear)


def test_invariants_name_what_is_not_finite() -> None:
    layer = TuckerConv2d(6, 5, 3, rank=2)
    with torch.no_grad():
        layer.factors[1][0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"factors\[1\]: got NaN"):
        layer.check_invariants()
    with torch.no_grad():
        layer.core[0] = math.inf
    with pytest.raises(NonFiniteError, match="core: got NaN or infinite"):
        layer.check_invariants()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_invariants_name_a_basis_that_is_not_orthonormal(dtype: torch.dtype) -> None:
    layer = TuckerConv2d(6, 5, 3, rank=2, dtype=dtype)
    layer.check_invariants()
    with torch.no_grad():
        layer.factors[1].mul_(1 + 40 * torch.finfo(dtype).eps)
    with pytest.raises(IntegratorStateError, match=r"factors\[1\]: max \|U\^T U - I\| is"):
        layer.check_invariants()


def test_invariants_name_ranks_that_do_not_fit() -> None:
    layer = TuckerConv2d(6, 5, 3, rank=2)
    basis = torch.eye(5)
    layer.factors[0].data = basis[:, :3]
    with pytest.raises(RankError, match=r"factors\[0\]: got shape \(5, 3\), expected 2 columns"):
        layer.check_invariants()
    layer.factors[0].data, layer.core.data = basis, torch.ones(5, 2, 2, 1)
    layer.factors[3].data = torch.eye(3)[:, :1]
    with pytest.raises(RankError, match=r"rank 5 of mode 0 is larger"):
        layer.check_invariants()


@pytest.mark.parametrize(
    ("core_shape", "factor_shapes"),
    [
        ((2, 2), [(6, 2), (7, 2)]),
        ((2, 2), [(5, 2)]),
        ((2, 3), [(5, 2), (7, 2)]),
        ((2, 2, 1), [(5, 2), (7, 2)]),
        ((2, 2, 1), [(5, 2), (7, 2), (1, 1)]),
    ],
)
def test_resize_refuses_shapes_that_do_not_fit(
    core_shape: tuple[int, ...], factor_shapes: list[tuple[int, int]]
) -> None:
    layer = TuckerLinear(7, 5, rank=3)
    weight = layer.dense_weight()
    with pytest.raises(RankError, match="core of shape"):
        layer.resize_(torch.ones(core_shape), [torch.ones(shape) for shape in factor_shapes])
    assert torch.equal(layer.dense_weight(), weight)


def test_a_tensor_that_does_not_fit_the_weight_is_refused() -> None:
    layer = TuckerLinear(6, 5, rank=2)
    other = TuckerTensor(layer.core.detach(), tuple(factor.detach() for factor in layer.factors))
    with pytest.raises(RankError, match=r"expected a core of 2 modes .* for n = \(6, 5\)"):
        TuckerLinear.from_linear(nn.Linear(5, 6), rank=other)
    taken = TuckerLinear.from_linear(nn.Linear(6, 5).double(), rank=other)
    assert torch.equal(taken.dense_weight(), layer.double().dense_weight())
