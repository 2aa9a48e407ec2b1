"""The check of all that a step puts in place: every tensor of it counts."""

import math

import pytest
import torch

from optim.problems import Small, tucker_layers
from tdlrt.linalg import Layout, TangentSpace, TangentVector
from tdlrt.optim.finite import sizes_after
from tdlrt.optim.steps import Augmented, Iterate, Lifted


def points():
    """A weight with a state in each of the forms that steps return."""
    layer = tucker_layers(Small().model)[0]
    layout = Layout([layer.shape], [layer.ranks], layer.learned_modes)
    core = layer.core.detach()[None].clone()
    factors = [basis.detach()[None].clone() for basis in layer.factors]
    parts = {mode: torch.ones_like(factors[mode]) for mode in layout.moving}
    moments = {name: TangentVector(torch.ones_like(core), parts) for name in ("first", "second")}
    iterate = Iterate(TangentSpace(core, factors, layout), moments, torch.ones(1))
    ranks = layout.rank_tensor()
    state = {name: moment.core for name, moment in moments.items()}
    return (
        iterate,
        Augmented(core, factors, ranks, iterate),
        Lifted(core, factors, ranks, state, ranks),
    )


@pytest.mark.parametrize("form", range(3), ids=["at rest", "augmented", "lifted"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_every_tensor_of_a_step_counts(form, value):
    point = points()[form]
    assert (sizes_after(point, torch.float32) < 1).all()
    tensors = [*point.weights(), *point.state()]
    blocks = 1 + 3  # the core and three bases
    moving = len(points()[0].moments["first"].parts)
    assert len(tensors) == blocks + 2 * (1 if form == 2 else 1 + moving)
    for tensor in tensors:
        before = tensor.clone()
        tensor.view(-1)[-1] = value
        assert not (sizes_after(point, torch.float32) < 1).all()
        tensor.copy_(before)
    assert (sizes_after(point, torch.float32) < 1).all()


@pytest.mark.parametrize("form", range(3))
def test_the_limit_is_that_of_the_type_that_is_stored(form):
    """A state stays in float32."""
    point = points()[form]
    point.state()[0].view(-1)[0] = 1e6
    assert (sizes_after(point, torch.float16) < 1).all()
    point.weights()[0].view(-1)[0] = 4e4
    assert not (sizes_after(point, torch.float16) < 1).all()
    assert (sizes_after(point, torch.bfloat16) < 1).all()
