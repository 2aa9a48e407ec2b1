"""The optimisers that Lightning and Fabric hand out in place of the one that trains."""

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.nn import functional as F

import tdlrt
from integrations.problems import loader, network


def lightning(model, optimizer):
    return model, LightningOptimizer(optimizer)


def fabric(model, optimizer):
    own = Fabric(accelerator="cpu", devices=1)
    own.launch()
    return own.setup(model, optimizer)


def wrapped(wrap, **options):
    model = network()
    options = {"tau": 0.3, "adapt_every": 1, "skip_nonfinite": 1, **options}
    optimizer = tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1, **options)
    return model, optimizer, *wrap(model, optimizer)


ARGUMENTS = ("integrator", "adapt_every", "core_steps", "basis_every", "freeze_after", "capturable")
PUBLIC = sorted(
    name
    for name in dir(tdlrt.TDLRT)
    if not name.startswith("_")
    and not hasattr(torch.optim.Optimizer, name)
    and (name in ARGUMENTS or not callable(getattr(tdlrt.TDLRT, name)))
)

wraps = pytest.mark.parametrize("wrap", [lightning, fabric])


@wraps
@pytest.mark.parametrize("name", PUBLIC)
def test_every_attribute_is_that_of_the_optimiser(wrap, name):
    _, optimizer, _, wrapper = wrapped(wrap)
    assert getattr(wrapper, name) == getattr(optimizer, name)


@wraps
@pytest.mark.parametrize(
    ("name", "value"),
    [("rank_policy", tdlrt.FixedRank()), ("skip_nonfinite", 7), ("skipped_steps", 3)],
)
def test_what_may_be_set_takes_effect(wrap, name, value):
    _, optimizer, _, wrapper = wrapped(wrap)
    setattr(wrapper, name, value)
    assert getattr(optimizer, name) == value


@pytest.mark.parametrize("wrap", [lightning, fabric, lambda *both: both])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_the_constructor_cannot_be_set(wrap, name):
    _, optimizer, _, wrapper = wrapped(wrap)
    before = getattr(optimizer, name)
    with pytest.raises(AttributeError, match=f"{name}: got 5, but it is an argument of .*TDLRT"):
        setattr(wrapper, name, 5)
    assert getattr(optimizer, name) == before


@wraps
def test_frozen_ranks_stay(wrap):
    model, optimizer, _, wrapper = wrapped(wrap, tau=0.9)
    wrapper.freeze_ranks()
    assert optimizer.ranks_frozen
    frozen = tdlrt.summary(model).ranks
    x, y = next(iter(loader()))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert tdlrt.summary(model).ranks == frozen


@wraps
def test_gradients_are_clipped_by_the_projected_gradient(wrap):
    _, optimizer, called, wrapper = wrapped(wrap)
    x, y = next(iter(loader()))
    F.cross_entropy(called(x), y).backward()
    norm = wrapper.clip_grad_norm_(1e-3)
    assert norm > 1e-3
    assert optimizer.clip_grad_norm_(1.0) == pytest.approx(1e-3, rel=1e-2)
