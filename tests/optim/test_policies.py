"""Rank policies at work in the optimiser: growth, spare ranks, freezing, a change of policy."""

import copy

import pytest
import torch
from torch import nn

import tdlrt
from optim.problems import INTEGRATORS, Small, assert_same
from reference.cases import gaussian, relative_error

SPARE = tdlrt.RelativeTolerance(0.3, spare=1.0)


class RankSix:
    """A matrix layer that starts at rank 1; the target has rank 6."""

    def __init__(self, policy, **options):
        torch.manual_seed(0)
        self.layer = tdlrt.nn.TuckerLinear(16, 20, rank=1, bias=False)
        self.model = nn.Sequential(self.layer)
        self.inputs = gaussian((200, 16), 1, torch.float32)
        target = gaussian((20, 6), 2, torch.float32) @ gaussian((6, 16), 3, torch.float32)
        self.outputs = self.inputs @ target.T / 8
        self.optimizer = tdlrt.TDLRT(
            self.model, torch.optim.SGD, lr=0.05, rank_policy=policy, **options
        )

    def closure(self):
        self.optimizer.zero_grad()
        loss = (self.model(self.inputs) - self.outputs).square().sum() / 200
        loss.backward()
        return loss

    def share_of_the_loss(self):
        """Loss relative to that of a weight of zero."""
        return self.closure().item() / (self.outputs.square().sum().item() / 200)


# --- growth -------------------------------------------------------------------------------------


@INTEGRATORS
@pytest.mark.parametrize(
    "policy",
    [
        tdlrt.RelativeTolerance(0.05, spare=0.25),
        tdlrt.ParameterBudget(parameters=36 + 6 * 36, spare=0.5),
    ],
)
def test_a_rank_grows_to_what_the_target_needs(policy, integrator):
    problem = RankSix(policy, integrator=integrator)
    for _ in range(60):
        problem.optimizer.step(problem.closure)
    assert problem.layer.ranks[0] > 6
    assert problem.share_of_the_loss() < 0.01
    problem.optimizer.freeze_ranks()
    assert problem.layer.ranks == (6, 6)
    assert problem.share_of_the_loss() < 0.02


def test_without_spare_ranks_a_small_rate_keeps_the_rank():
    """A new direction has a singular value of the order of the rate, and one step to pass tau."""
    problem = RankSix(tdlrt.RelativeTolerance(0.05))
    for _ in range(60):
        problem.optimizer.step(problem.closure)
    assert problem.layer.ranks == (1, 1)
    assert problem.share_of_the_loss() > 0.4


@INTEGRATORS
def test_a_network_stays_within_its_budget_after_every_step(integrator):
    policy = tdlrt.ParameterBudget(0.3)
    problem = Small("adamw", tau=None, rank_policy=policy, integrator=integrator)
    for _ in range(5):
        problem.step()
        report = tdlrt.summary(problem.model)
        assert report.parameters <= 0.3 * report.dense_parameters
    assert report.parameters > 0.2 * report.dense_parameters


@INTEGRATORS
def test_a_budget_goes_on_after_a_reload_as_if_there_had_been_none(integrator):
    """What it knows of the layers' gradients is part of the state."""
    ramp = tdlrt.LinearSchedule(0.9, 0.2, steps=8)
    options = {"tau": None, "rank_policy": tdlrt.ParameterBudget(ramp), "integrator": integrator}
    problem, fresh = Small(**options), Small(seed=1, **options)
    problem.step(4)
    fresh.model.load_state_dict(problem.model.state_dict())
    fresh.optimizer.load_state_dict(copy.deepcopy(problem.optimizer.state_dict()))
    for one in (problem, fresh):
        one.step(4)
    assert_same(problem.optimizer.state_dict(), fresh.optimizer.state_dict())
    assert_same(problem.model.state_dict(), fresh.model.state_dict())


def test_a_layer_without_a_gradient_counts_in_the_budget():
    problem = Small(tau=None, rank_policy=tdlrt.ParameterBudget(0.4))
    conv, linear = problem.layers
    conv.requires_grad_(False)
    before = [parameter.clone() for parameter in conv.parameters()]
    problem.step(3)
    assert_same(before, list(conv.parameters()))
    report = tdlrt.summary(problem.model)
    assert report.parameters <= 0.4 * report.dense_parameters
    assert linear.weight_parameters < 0.4 * linear.to_dense().weight.numel()


@INTEGRATORS
@pytest.mark.parametrize("gain", [0.1, 10.0])
def test_the_curvature_is_the_running_mean_square_of_the_core_gradient(integrator, gain):
    problem = Small("sgd", lr=1e-9, tau=None, rank_policy=tdlrt.FixedRank(), integrator=integrator)
    squares, gradients = [], []
    for scale in (1.0, gain):

        def closure(scale=scale):
            problem.optimizer.zero_grad()
            loss = scale * problem.loss()
            loss.backward()
            gradients[:] = [layer.core.grad.double() for layer in problem.layers]
            return loss

        problem.optimizer.step(closure)  # `bug` observes the last of its evaluations
        squares.append([float(gradient.square().mean()) for gradient in gradients])
    found = problem.optimizer.state_dict()["tdlrt"]["curvatures"].values()
    for value, first, second in zip(found, *squares, strict=True):
        assert float(value) == pytest.approx(0.9 * first + 0.1 * second, rel=1e-4)


@INTEGRATORS
def test_a_tolerance_follows_its_schedule_by_whole_steps(integrator):
    ramp = tdlrt.LinearSchedule(0.0, 0.6, steps=3)
    problem = Small(tau=None, rank_policy=tdlrt.RelativeTolerance(ramp), integrator=integrator)
    for tau in (0.2, 0.4, 0.6, 0.6):
        twin = Small(tau=None, rank_policy=tdlrt.RelativeTolerance(tau), integrator=integrator)
        twin.model.load_state_dict(problem.model.state_dict())
        twin.optimizer.load_state_dict(copy.deepcopy(problem.optimizer.state_dict()))
        for one in (problem, twin):
            one.step()
        assert_same(problem.model.state_dict(), twin.model.state_dict())


def test_patterns_choose_layers_by_name():
    policies = {"0": tdlrt.RelativeTolerance(0.0, max_rank=2)}
    problem = Small(tau=None, rank_policy=policies)
    before = problem.ranks
    problem.step()
    assert problem.ranks == [(2, 2, 2), before[1]]


# --- freezing -----------------------------------------------------------------------------------


def settled_within(problem, before, tau=0.3):
    """Whether all layers are within tau of what they were, at smaller ranks."""
    for layer, (weight, ranks) in zip(problem.layers, before, strict=True):
        layer.check_invariants()
        assert relative_error(layer.dense_weight(), weight) <= tau
        assert sum(layer.ranks) <= sum(ranks)
    assert problem.ranks != [ranks for _, ranks in before]


def weights_and_ranks(problem):
    return [(layer.dense_weight().detach(), layer.ranks) for layer in problem.layers]


@INTEGRATORS
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_freezing_gives_up_spare_ranks_at_once(name, integrator):
    problem = Small(name, tau=None, rank_policy=SPARE, integrator=integrator)
    problem.step(3)
    before = weights_and_ranks(problem)
    state = {id(p) for p, s in problem.optimizer.state.items() if s}
    problem.optimizer.freeze_ranks()
    settled_within(problem, before)
    assert {id(p) for p, s in problem.optimizer.state.items() if s} == state
    ranks = problem.ranks
    problem.step(3)
    assert problem.ranks == ranks


def test_freezing_in_mid_alternation_gives_them_up_at_the_end_of_the_step():
    problem, twin = (
        Small("adamw", tau=None, rank_policy=SPARE, integrator="bug", core_steps=2)
        for _ in range(2)
    )
    for one in (problem, twin):
        one.call(3 * 3 + 1)
    problem.optimizer.freeze_ranks()
    assert problem.ranks == twin.ranks  # still the augmented ones
    problem.call()
    twin.call()
    assert problem.ranks == twin.ranks
    twin.optimizer.rank_policy = tdlrt.RelativeTolerance(0.3)  # what is to be left at the end
    problem.call()
    twin.call()
    assert problem.ranks == twin.ranks
    assert_same(problem.model.state_dict(), twin.model.state_dict())
    ranks = problem.ranks
    problem.call(6)
    assert problem.ranks == ranks


def test_freezing_in_mid_alternation_settles_layers_without_a_gradient_too():
    problem = Small(tau=None, rank_policy=SPARE, integrator="bug")
    problem.step(2)
    resting = problem.layers[1].requires_grad_(False)
    problem.call()
    ranks = resting.ranks
    problem.optimizer.freeze_ranks()
    assert resting.ranks == ranks
    problem.call()
    assert sum(resting.ranks) < sum(ranks)


def test_a_freeze_in_mid_alternation_survives_a_checkpoint():
    problem, other = (Small(tau=None, rank_policy=SPARE, integrator="bug") for _ in range(2))
    problem.call(7)
    problem.optimizer.freeze_ranks()
    other.model.load_state_dict(problem.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(problem.optimizer.state_dict()))
    assert other.optimizer.ranks_frozen
    for one in (problem, other):
        one.call(3)
    assert_same(problem.model.state_dict(), other.model.state_dict())


def test_freezing_twice_is_freezing_once():
    problem = Small(tau=None, rank_policy=SPARE)
    problem.step(3)
    problem.optimizer.freeze_ranks()
    before = copy.deepcopy((problem.model.state_dict(), problem.optimizer.state_dict()))
    problem.optimizer.freeze_ranks()
    assert_same(before, (problem.model.state_dict(), problem.optimizer.state_dict()))


@pytest.mark.parametrize("policy", [tdlrt.FixedRank(), tdlrt.RelativeTolerance(0.3)])
def test_freezing_without_spare_ranks_changes_no_weight(policy):
    problem = Small(tau=None, rank_policy=policy)
    problem.step(2)
    before = copy.deepcopy(problem.model.state_dict())
    problem.optimizer.freeze_ranks()
    assert_same(before, problem.model.state_dict())


@INTEGRATORS
def test_freezing_by_count_gives_up_spare_ranks_too(integrator):
    problem = Small(tau=None, rank_policy=SPARE, integrator=integrator, freeze_after=3)
    twin = Small(tau=None, rank_policy=SPARE, integrator=integrator)
    problem.step(3)
    twin.step(3)
    twin.optimizer.freeze_ranks()
    assert problem.optimizer.ranks_frozen
    assert_same(problem.model.state_dict(), twin.model.state_dict())


# --- another policy -----------------------------------------------------------------------------


def test_a_new_policy_holds_from_the_next_step():
    problem = Small(tau=0.0)
    problem.step()
    problem.optimizer.rank_policy = {"0": tdlrt.RelativeTolerance(0.0, max_rank=2)}
    before = problem.ranks
    problem.step()
    assert problem.ranks == [(2, 2, 2), before[1]]


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (
            tdlrt.ParameterBudget(0.01),
            tdlrt.RankError,
            "budget: got 0.01, but the smallest",
        ),
        ({"9": tdlrt.FixedRank()}, tdlrt.NothingMatchedError, "matches none of the Tucker layers"),
        (0.1, tdlrt.RankError, "rank_policy: got 0.1, expected RelativeTolerance"),
    ],
)
def test_a_new_policy_that_cannot_be_met(policy, error, message):
    problem = Small(tau=0.1)
    with pytest.raises(error, match=message):
        problem.optimizer.rank_policy = policy
    assert problem.optimizer.rank_policy == tdlrt.RelativeTolerance(0.1)
    with pytest.raises(error, match=message):
        Small(tau=None, rank_policy=policy)


def test_a_frozen_optimizer_takes_no_policy():
    problem = Small()
    problem.optimizer.freeze_ranks()
    with pytest.raises(tdlrt.IntegratorStateError, match=r"ranks are frozen.*construct a new"):
        problem.optimizer.rank_policy = tdlrt.RelativeTolerance(0.2)


def test_a_layer_without_a_gradient_is_neither_cut_nor_counted():
    problem = Small(tau=None, rank_policy=tdlrt.ParameterBudget(0.3))
    resting = problem.layers[1].requires_grad_(False)
    ranks = resting.ranks
    problem.step(2)
    assert resting.ranks == ranks
    rows = {row.name: row for row in tdlrt.summary(problem.model).rows}
    assert rows["0"].parameters <= 0.3 * rows["0"].dense_parameters


def test_frozen_ranks_meet_a_budget_that_was_never_due():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 3))
    tdlrt.factorize_(model, rank=0.9)
    policy = tdlrt.ParameterBudget(0.3)
    optimizer = tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1, rank_policy=policy, adapt_every=100)
    assert tdlrt.summary(model).parameters > 0.3 * 1200
    optimizer.freeze_ranks()
    assert tdlrt.summary(model).parameters <= 0.3 * 1200


def experts():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])
    tdlrt.factorize_(model, rank=0.5, include="*")
    return model


@INTEGRATORS
def test_experts_that_take_turns_get_ranks_alike_under_a_budget(integrator):
    model = experts()
    policy = tdlrt.ParameterBudget(0.4)
    options = {"lr": 0.05, "rank_policy": policy, "integrator": integrator}
    optimizer = tdlrt.TDLRT(model, torch.optim.SGD, **options)

    def train(number):
        def closure():
            optimizer.zero_grad()
            model[number % 4](gaussian((16, 32), number, torch.float32)).square().sum().backward()

        optimizer.step(closure)

    for number in range(12):
        train(number)
    ranks = [expert.ranks[0] for expert in model]
    assert min(ranks) >= max(ranks) / 2
    assert tdlrt.summary(model).parameters <= 0.4 * 4 * 32 * 32


def test_a_budget_that_frozen_layers_use_up_is_refused():
    model = experts()
    for expert in model[:3]:
        expert.requires_grad_(False)
    with pytest.raises(tdlrt.RankError, match=r"budget of 3100 .* frozen layers keep 3003"):
        policy = tdlrt.ParameterBudget(parameters=3100)
        tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1, rank_policy=policy)


@INTEGRATORS
@pytest.mark.parametrize(
    "policy", [tdlrt.ParameterBudget(parameters=4500), tdlrt.RelativeTolerance(0.5, spare=2)]
)
def test_layers_that_are_never_trained_stay_as_they_are(integrator, policy):
    model = experts()
    for expert in model[:3]:
        expert.requires_grad_(False)
    before = copy.deepcopy(model[:3].state_dict())
    options = {"lr": 0.01, "rank_policy": policy, "integrator": integrator}
    optimizer = tdlrt.TDLRT(model, torch.optim.SGD, **options)

    def closure():
        optimizer.zero_grad()
        model[3](gaussian((16, 32), 0, torch.float32)).square().mean().backward()

    optimizer.step(closure)
    optimizer.freeze_ranks()
    optimizer.step(closure)
    assert_same(before, model[:3].state_dict())
    assert model[3].ranks[0] > 1
