"""Bases that rest: in which steps, and what a training notices of it."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import tdlrt
from optim.problems import EVERY_OPTIMIZER, Small, assert_same
from optim.test_loops import load, saved
from reference.cases import gaussian, relative_error
from tdlrt.nn.models import tucker_layers

MLP = (20, 24, 16, 4)
FIXED = {"rank_policy": tdlrt.FixedRank(), "tau": None}


class Network:
    """A network of three layers, two of them in Tucker format."""

    def __init__(self, **options):
        torch.manual_seed(0)
        first, second, last = (nn.Linear(*pair) for pair in itertools.pairwise(MLP))
        self.model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)
        tdlrt.factorize_(self.model, rank={"0": 2, "2": 6})
        self.layers = tucker_layers(self.model)
        options = {"lr": 0.05, "momentum": 0.9, "rank_policy": tdlrt.FixedRank()} | options
        self.optimizer = tdlrt.TDLRT(self.model, torch.optim.SGD, **options)
        self.inputs = gaussian((6, MLP[0]), 1, torch.float32)
        self.labels = torch.arange(6) % 4

    def step(self):
        """The layers whose bases have moved."""
        before = {name: layer.factors[0].detach().clone() for name, layer in self.layers.items()}
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.inputs), self.labels).backward()
        self.optimizer.step()
        return [n for n, layer in self.layers.items() if not layer.factors[0].equal(before[n])]


# --- which steps -----------------------------------------------------------------


def test_by_default_networks_move_all_bases_in_every_step():
    network = Network()
    for _ in range(3):
        assert network.step() == ["0", "2"]


def test_all_layers_rest_where_a_number_is_given():
    network = Network(basis_every=3)
    assert [network.step() for _ in range(7)] == [["0", "2"], [], []] * 2 + [["0", "2"]]


def test_layers_that_take_turns_move_their_bases():
    network = Network(basis_every=2)
    moved = []
    for number in range(8):
        network.layers["2"].requires_grad_(number % 2 == 1)
        moved.append(network.step())
    assert sum("2" in names for names in moved) >= 2
    assert sum("0" in names for names in moved) >= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"basis_every": 2, "integrator": "bug"},
            "basis_every: got 2 with integrator='bug', expected 1",
        ),
        (
            {"basis_every": 2, "capturable": True},
            "basis_every: got 2 with capturable=True, expected 1",
        ),
        ({"basis_every": 0}, "basis_every: got 0, expected an int of at least 1"),
    ],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        Network(**options)


# --- ranks --------------------------------------------------------------------------------------


def test_ranks_are_examined_in_steps_that_move_all_bases():
    problem = Small(tau=0.3, basis_every=4, adapt_every=3)
    changed, ranks = [], problem.ranks
    for number in range(1, 18):
        postponed = problem.optimizer.state_dict()["tdlrt"]["postponed"]
        problem.call()
        assert postponed == (number in (4, 5, 7, 8, 9, 13, 16, 17))
        if problem.ranks != ranks:
            changed.append(number)
            ranks = problem.ranks
    assert changed
    assert set(changed) <= {5, 9, 13, 17}


def test_freezing_cuts_layers_whose_bases_rest():
    problem = Small("adam", tau=None, rank_policy=tdlrt.RelativeTolerance(0.0, spare=2))
    problem.optimizer = tdlrt.TDLRT(
        problem.model,
        torch.optim.Adam,
        lr=0.01,
        rank_policy=tdlrt.RelativeTolerance(0.2, spare=2),
        basis_every=4,
    )
    problem.call(7)
    ranks = problem.ranks
    problem.optimizer.freeze_ranks()
    assert problem.ranks != ranks
    problem.call(6)
    for layer in problem.layers:
        layer.check_invariants()


# --- what a training notices --------------------------------------------------------------------


@EVERY_OPTIMIZER
@pytest.mark.parametrize("calls", [4, 5, 6, 7])
def test_save_load_continue_equals_continue(optimizer_name, calls):
    options = {"tau": 0.3, "basis_every": 4, "adapt_every": 3}
    problem, other = Small(optimizer_name, **options), Small(optimizer_name, seed=1, **options)
    problem.call(calls)
    load(other, saved(problem))
    problem.call(7)
    other.call(7)
    assert_same(problem.model.state_dict(), other.model.state_dict())
    assert_same(problem.optimizer.state_dict(), other.optimizer.state_dict())


def test_an_old_checkpoint_loads():
    problem, other = Small("adam", basis_every=3), Small("adam", basis_every=3)
    problem.call()
    state = problem.optimizer.state_dict()
    del state["tdlrt"]["resting_bases"], state["tdlrt"]["postponed"]
    other.model.load_state_dict(problem.model.state_dict())
    other.optimizer.load_state_dict(state)
    other.call(4)


def test_the_norm_of_a_step_on_cores_is_theirs():
    problem = Small(basis_every=2, rank_policy=tdlrt.FixedRank(), tau=None)
    problem.call()
    problem.backward()
    parts = [layer.core.grad for layer in problem.layers]
    parts += [p.grad for p in problem.optimizer.param_groups[1]["params"]]
    expected = torch.linalg.vector_norm(torch.cat([part.flatten() for part in parts]))
    norm = problem.optimizer.clip_grad_norm_(1e9)
    assert relative_error(norm.float(), expected) < 1e-5


@EVERY_OPTIMIZER
def test_weights_that_others_write_are_those_that_steps_begin_at(optimizer_name):
    options = {"basis_every": 3, "rank_policy": tdlrt.FixedRank(), "tau": None}
    ours, theirs = (Small(optimizer_name, **options) for _ in range(2))
    for problem in (ours, theirs):
        problem.call(2)
    for layer in ours.layers:
        layer.core.data.mul_(2.0)
    with torch.no_grad():
        for layer in theirs.layers:
            layer.core.mul_(2.0)
    for problem in (ours, theirs):
        problem.call(3)
    assert_same(ours.model.state_dict(), theirs.model.state_dict())


def test_a_step_that_is_not_finite_changes_nothing():
    problem = Small("adam", basis_every=3, rank_policy=tdlrt.FixedRank(), tau=None)
    problem.call(2)
    before = copy.deepcopy((problem.model.state_dict(), problem.optimizer.state_dict()))
    problem.backward()
    problem.layers[0].core.grad[0, 0, 0] = math.inf
    with pytest.raises(tdlrt.NonFiniteError):
        problem.optimizer.step()
    assert_same(before, (problem.model.state_dict(), problem.optimizer.state_dict()))


def test_state_that_is_cleared_begins_anew():
    problem = Small("adam", basis_every=3, rank_policy=tdlrt.FixedRank(), tau=None)
    problem.call(2)
    problem.optimizer.state.clear()
    problem.call(5)
    for layer in problem.layers:
        layer.check_invariants()


def test_a_frozen_layer_with_a_gradient_disturbs_no_other():
    """As `zero_grad(set_to_none=False)` leaves it."""
    ours, theirs = (Small("momentum", basis_every=3, **FIXED) for _ in range(2))
    for problem in (ours, theirs):
        problem.call(4)
    ours.layers[0].requires_grad_(False)
    for problem in (ours, theirs):
        for _ in range(3):
            problem.optimizer.zero_grad(set_to_none=False)
            problem.loss().backward()
            for parameter in problem.layers[0].parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            problem.optimizer.step()
    assert_same(ours.layers[1].state_dict(), theirs.layers[1].state_dict())
