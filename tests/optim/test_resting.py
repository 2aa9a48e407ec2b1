"""Bases that rest: which layers, for how many steps, and what a training notices of it."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

import tdlrt
from optim.problems import EVERY_OPTIMIZER, Small, assert_same
from optim.test_loops import load, saved
from reference.cases import gaussian, relative_error
from tdlrt.nn.layer import tucker_layers
from tdlrt.optim import resting

MLP = (20, 24, 16, 4)


class Wide:
    """A network whose middle layer is wide, for a bound that says so."""

    def __init__(self, monkeypatch=None, rows=6, batches=1, **options):
        if monkeypatch is not None:
            monkeypatch.setattr(resting, "_WIDE", 0.9 * middle_work())
        torch.manual_seed(0)
        first, second, last = (nn.Linear(*pair) for pair in itertools.pairwise(MLP))
        self.model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)
        tdlrt.factorize_(self.model, rank={"0": 2, "2": 6})
        self.layers = tucker_layers(self.model)
        options = {"lr": 0.05, "momentum": 0.9, "rank_policy": tdlrt.FixedRank()} | options
        self.optimizer = tdlrt.TDLRT(self.model, torch.optim.SGD, **options)
        self.inputs = gaussian((rows, MLP[0]), 1, torch.float32)
        self.labels = torch.arange(rows) % 4

    def step(self):
        """The layers whose bases have moved."""
        before = {name: layer.factors[0].detach().clone() for name, layer in self.layers.items()}
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.inputs), self.labels).backward()
        self.optimizer.step()
        return [n for n, layer in self.layers.items() if not layer.factors[0].equal(before[n])]


def middle_work(rank=6):
    return 20 * sum(n * rank**2 + rank**3 for n in MLP[1:3])


# --- which layers, and how long -----------------------------------------------------------------


def test_small_networks_move_all_bases_in_every_step():
    wide = Wide()
    for _ in range(3):
        assert wide.step() == ["0", "2"]


@pytest.mark.parametrize("rows", [6, 24, 1000, 4000])
def test_wide_layers_rest_for_so_long_that_they_take_a_fifth(monkeypatch, rows):
    wide = Wide(monkeypatch, rows=rows)
    passes = 3 * rows * sum(layer.weight_parameters for layer in wide.layers.values())
    period = 2 ** max(0, math.ceil(math.log2(4 * middle_work() / passes)))
    assert middle_work() <= 0.2 * (middle_work() + period * passes)
    assert period == 1 or middle_work() > 0.2 * (middle_work() + period / 2 * passes)
    moved = [wide.step() for _ in range(2 * period + 1)]
    for number, names in enumerate(moved):
        assert names == (["0", "2"] if number % period == 0 else ["0"])


def test_rows_are_those_of_the_first_step_whatever_else_runs(monkeypatch):
    wide, twice = Wide(monkeypatch, rows=8), Wide(monkeypatch, rows=4)
    with torch.no_grad():
        wide.model(gaussian((500, MLP[0]), 0, torch.float32))  # an evaluation
    wide.step()
    for _ in range(2):  # two micro-batches
        nn.functional.cross_entropy(twice.model(twice.inputs), twice.labels).backward()
    twice.optimizer.step()
    expected = {"0": 8, "2": 8}
    for problem in (wide, twice):
        assert problem.optimizer.state_dict()["tdlrt"]["resting_bases"]["rows"] == expected
        assert not any(layer._forward_hooks for layer in problem.layers.values())


def test_a_model_is_copied_and_pickled_before_its_first_step(monkeypatch):
    wide = Wide(monkeypatch)
    assert all(layer._forward_hooks for layer in wide.layers.values())
    for model in (copy.deepcopy(wide.model), pickle.loads(pickle.dumps(wide.model))):
        assert_same(model(wide.inputs), wide.model(wide.inputs))


def test_convolutions_count_positions(monkeypatch):
    monkeypatch.setattr(resting, "_WIDE", 1.0)
    problem = Small()
    problem.call()
    rows = problem.optimizer.state_dict()["tdlrt"]["resting_bases"]["rows"]
    assert rows == {"0": 8 * 6, "3": 8}


def test_all_layers_rest_where_a_number_is_given():
    wide = Wide(basis_every=3)
    assert [wide.step() for _ in range(7)] == [["0", "2"], [], []] * 2 + [["0", "2"]]


def test_layers_that_take_turns_move_their_bases():
    wide = Wide(basis_every=2)
    moved = []
    for number in range(8):
        wide.layers["2"].requires_grad_(number % 2 == 1)
        moved.append(wide.step())
    assert sum("2" in names for names in moved) >= 2
    assert sum("0" in names for names in moved) >= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis_every": 2, "integrator": "bug"}, "basis_every: got 2 with integrator='bug'"),
        ({"basis_every": 2, "capturable": True}, "basis_every: got 2 with capturable=True"),
        ({"basis_every": 0}, "basis_every: got 0, expected an int of at least 1"),
    ],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        Wide(**options)


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


def test_a_wide_network_goes_on_from_a_checkpoint(monkeypatch):
    whole, half = (Wide(monkeypatch) for _ in range(2))
    for _ in range(3):
        half.step()
    file = io.BytesIO()
    torch.save({"model": half.model.state_dict(), "optimizer": half.optimizer.state_dict()}, file)
    file.seek(0)
    rest = Wide(monkeypatch)
    load(rest, file)
    moved = [whole.step() for _ in range(9)]
    assert [rest.step() for _ in range(6)] == moved[3:]
    assert_same(rest.model.state_dict(), whole.model.state_dict())


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
