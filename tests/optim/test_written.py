"""Weights that somebody else writes: a step begins at the weights that the model has."""

import copy
import warnings

import pytest
import torch
from torch import nn

import tdlrt
from optim.problems import EVERY_OPTIMIZER, INTEGRATORS, Small, assert_same
from reference.cases import gaussian, relative_error
from tdlrt.linalg import Layout, TangentSpace, TangentVector
from tdlrt.optim.rules.adam import AdamRule
from tdlrt.optim.steps import core_brought_along

FIXED = {"tau": None, "rank_policy": tdlrt.FixedRank()}


def clip(parameters):
    for p in parameters:
        p.clamp_(-0.2, 0.2)


def decay(parameters):
    for p in parameters:
        p.mul_(0.9)


def initialise(parameters):
    for p in parameters:
        if p.ndim > 1:
            nn.init.xavier_uniform_(p)


def average(parameters):
    """With weights of before, as a restored average is made."""
    for number, p in enumerate(parameters):
        p.lerp_(gaussian(p.shape, number, p.dtype) / 10, 0.1)


def through_data(parameters):
    for p in parameters:
        p.data.copy_(p.data * 1.1)


def flat(parameters):
    parameters = list(parameters)
    vector = nn.utils.parameters_to_vector(parameters)
    nn.utils.vector_to_parameters(0.8 * vector, parameters)


WAYS = pytest.mark.parametrize("write", [clip, decay, initialise, average, through_data, flat])


def weights(problem):
    return [layer.dense_weight().detach() for layer in problem.layers]


@WAYS
# After three calls `bug` would cut what was written to the ranks at rest.
@pytest.mark.parametrize(
    ("integrator", "calls"), [("parallel", 0), ("parallel", 3), ("bug", 0), ("bug", 2)]
)
def test_a_small_step_changes_no_weight(write, integrator, calls):
    problem = Small("momentum", lr=1e-12, integrator=integrator, dtype=torch.float64, **FIXED)
    problem.call(calls)
    with torch.no_grad():
        write(problem.model.parameters())
    before = weights(problem)
    problem.call(2)
    for layer, weight in zip(problem.layers, before, strict=True):
        assert relative_error(layer.dense_weight(), weight) < 1e-8
        if integrator == "parallel":
            layer.check_invariants()


@EVERY_OPTIMIZER
@INTEGRATORS
def test_the_step_is_that_of_the_same_weight_with_orthonormal_bases(optimizer_name, integrator):
    options = {"integrator": integrator, "dtype": torch.float64, **FIXED}
    ours, theirs = (Small(optimizer_name, **options) for _ in range(2))
    with torch.no_grad():
        for layer, twin in zip(ours.layers, theirs.layers, strict=True):
            for mode in layer.learned_modes:
                size = layer.ranks[mode]
                turn = torch.eye(size).double() + gaussian((size, size), mode) / 10
                q, r = torch.linalg.qr(layer.factors[mode] @ turn)
                signs = r.diagonal().sign()
                layer.factors[mode].copy_(layer.factors[mode] @ turn)
                twin.factors[mode].copy_(q * signs)
                matrix = (signs[:, None] * r) @ twin.core.movedim(mode, 0).flatten(1)
                shape = twin.core.movedim(mode, 0).shape
                twin.core.copy_(matrix.view(shape).movedim(0, mode))
    for weight, twin in zip(weights(ours), weights(theirs), strict=True):
        assert relative_error(weight, twin) < 1e-12
    norms = []
    for problem in (ours, theirs):
        problem.backward()
        norms.append(problem.optimizer.clip_grad_norm_(1e9))
        problem.optimizer.step()
        problem.call(3)
    assert relative_error(*norms) < 1e-10
    for weight, twin in zip(weights(ours), weights(theirs), strict=True):
        assert relative_error(weight, twin) < 1e-8


def test_bases_that_rest_are_written_too():
    problem = Small("momentum", basis_every=3, lr=1e-12, dtype=torch.float64, **FIXED)
    problem.call(2)
    with torch.no_grad():
        decay(problem.model.parameters())
    before = weights(problem)
    problem.call()
    for layer, weight in zip(problem.layers, before, strict=True):
        assert relative_error(layer.dense_weight(), weight) < 1e-8
        layer.check_invariants()


def test_layers_without_a_gradient_wait_as_they_are():
    problem = Small("momentum", lr=0.01, **FIXED)
    problem.call()
    with torch.no_grad():
        decay(problem.layers[1].parameters())
    problem.layers[1].requires_grad_(False)
    before = copy.deepcopy(problem.layers[1].state_dict())
    problem.call(2)
    assert_same(before, problem.layers[1].state_dict())


@INTEGRATORS
def test_a_basis_with_dependent_columns_is_refused_by_name(integrator):
    problem = Small("momentum", integrator=integrator, **FIXED)
    problem.call(2)
    with torch.no_grad():
        problem.layers[1].factors[0][:, 1] = problem.layers[1].factors[0][:, 0]
    before = copy.deepcopy(problem.model.state_dict())
    for _ in range(2):
        problem.backward()
        with pytest.raises(tdlrt.IntegratorStateError, match=r"3\.factors\.0: got a basis"):
            problem.optimizer.step()
    assert_same(before, problem.model.state_dict())


@pytest.mark.parametrize(("share", "refused"), [(4, True), (32, False), (1000, False)])
def test_columns_are_dependent_from_eight_eps_on(share, refused):
    problem = Small("momentum", lr=1e-12, dtype=torch.float64, **FIXED)
    problem.call(2)
    basis = problem.layers[1].factors[0]
    with torch.no_grad():
        basis[:, :2] = 0.0
        basis[0, :2], basis[1, 1] = 1.0, share * torch.finfo(torch.float64).eps
        basis[:2, 2:] = 0.0
    problem.backward()
    if refused:
        with pytest.raises(tdlrt.IntegratorStateError, match=r"3\.factors\.0: got a basis"):
            problem.optimizer.step()
    else:
        problem.optimizer.step()
        problem.layers[1].check_invariants()


def test_parameters_that_were_replaced_are_refused_by_name():
    problem = Small("momentum", **FIXED)
    problem.call()
    state = {name: tensor.clone() for name, tensor in problem.model.state_dict().items()}
    problem.model.load_state_dict(state, assign=True)
    problem.backward()
    with pytest.raises(tdlrt.IntegratorStateError, match="0: its parameters are not those"):
        problem.optimizer.step()


@EVERY_OPTIMIZER
def test_the_state_follows_weights_that_others_turn(optimizer_name):
    """Other bases of the same ranges: the same W, so the same first moments as tensors."""
    problem = Small(optimizer_name, dtype=torch.float64, **FIXED)
    problem.call(3)
    layer = problem.layers[1]
    before = moments_in_full(problem, layer)
    with torch.no_grad():
        for mode in (0, 1):
            size = layer.ranks[mode]
            turn = torch.linalg.qr(gaussian((size, size), mode))[0]
            layer.factors[mode].copy_(layer.factors[mode] @ turn)
            layer.core.copy_(turn.T @ layer.core if mode == 0 else layer.core @ turn)
    problem.optimizer.clip_grad_norm_(1e9)  # looks at the weights
    after = moments_in_full(problem, layer)
    assert before.keys() == after.keys()
    for name, moment in after.items():
        assert relative_error(moment, before[name]) < 1e-10


def moments_in_full(problem, layer):
    """First moments of a linear layer as tensors of the size of W."""
    state, space = problem.optimizer.state, tangent_space(layer)
    names = set(state[layer.core]) & {"momentum_buffer", "exp_avg"} if layer.core in state else ()
    found = {}
    for name in names:
        parts = {mode: state[layer.factors[mode]][name][None].clone() for mode in (0, 1)}
        parts = {mode: parts[mode] for mode in space.moving_modes}
        found[name] = space.to_tensor(TangentVector(state[layer.core][name][None].clone(), parts))
    return found


def tangent_space(layer):
    layout = Layout([layer.shape], [layer.ranks], layer.learned_modes, layer.core.device)
    factors = [factor.detach()[None].clone() for factor in layer.factors]
    return TangentSpace(layer.core.detach()[None].clone(), factors, layout)


@EVERY_OPTIMIZER
def test_weights_that_were_swapped_and_restored_change_nothing(optimizer_name):
    ours, theirs = (Small(optimizer_name, tau=0.3) for _ in range(2))
    for problem in (ours, theirs):
        problem.call(3)
    weights = copy.deepcopy(ours.model.state_dict())
    with torch.no_grad():
        decay(ours.model.parameters())
    ours.model.load_state_dict(weights)
    for problem in (ours, theirs):
        problem.call(3)
    assert_same(ours.model.state_dict(), theirs.model.state_dict())
    assert_same(ours.optimizer.state_dict(), theirs.optimizer.state_dict())


def test_two_optimisers_train_one_trunk_in_turns():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
    tdlrt.factorize_(trunk, rank=0.5, include="*")
    heads = [nn.Sequential(trunk, nn.Linear(24, size)) for size in (4, 1)]
    optimizers = [tdlrt.TDLRT(head, torch.optim.Adam, lr=1e-2, tau=0.2) for head in heads]
    inputs = gaussian((32, 16), 0, torch.float32)
    losses = []
    for step in range(12):
        head, optimizer = heads[step % 2], optimizers[step % 2]
        head.zero_grad()
        loss = (head(inputs) - inputs[:, : head[1].out_features]).square().mean()
        loss.backward()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*were changed by another optimiser")
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[1]
    assert losses[-2] < losses[0]


def test_a_state_of_other_ranks_begins_anew_with_a_warning():
    problem, other = Small("adam", tau=0.5), Small("adam", **FIXED)
    problem.call(3)
    other.call(3)
    other.model.load_state_dict(problem.model.state_dict())
    other.backward()
    with pytest.warns(UserWarning, match=r"\d: its ranks were changed by another"):
        other.optimizer.step()
    other.call(2)


def test_tensor_rates_are_one_tensor_a_group():
    problem = Small("sgd", lr=torch.tensor(0.1), **FIXED)
    first, second = (group["lr"] for group in problem.optimizer.param_groups)
    second.fill_(0.5)
    assert float(first) == pytest.approx(0.1)


def test_freeze_after_that_has_passed_freezes_at_once():
    problem, other = Small("momentum", tau=0.1), Small("momentum", tau=0.1, freeze_after=2)
    problem.call(3)
    other.model.load_state_dict(problem.model.state_dict())
    other.optimizer.load_state_dict(problem.optimizer.state_dict())
    assert other.optimizer.ranks_frozen


def test_what_is_no_model_or_no_list_is_refused_at_once():
    model = Small().model
    expected = r"model: got generator, expected a torch\.nn\.Module"
    with pytest.raises(tdlrt.UnsupportedLayerError, match=expected):
        tdlrt.TDLRT(model.parameters(), torch.optim.SGD, lr=0.1)
    groups = [{"params": set(model[0].parameters())}]
    with pytest.raises(TypeError, match="params: got a set"):
        tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1, param_groups=groups)
    groups = [{"params": model[0].named_parameters(), "lr": 0.2}]
    optimizer = tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1, param_groups=groups)
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 3, 5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_that_were_written_saved_and_restored(dtype):
    ours, theirs = (Small("momentum", dtype=dtype, **FIXED) for _ in range(2))
    for problem in (ours, theirs):
        problem.call(3)
    keep = copy.deepcopy(ours.model.state_dict())
    with torch.no_grad():
        decay(ours.model.parameters())
    ours.optimizer.state_dict()
    ours.model.load_state_dict(keep)
    for problem in (ours, theirs):
        problem.call()
    tolerance = 1e-8 if dtype == torch.float64 else 0.05
    for weight, expected in zip(weights(ours), weights(theirs), strict=True):
        assert relative_error(weight.double(), expected.double()) < tolerance


@INTEGRATORS
def test_a_first_step_that_is_refused_in_low_precision(integrator):
    options = {"dtype": torch.bfloat16, "skip_nonfinite": 5, "integrator": integrator}
    problem = Small("momentum", **options, **FIXED)
    problem.backward()
    problem.model[-1].weight.grad.fill_(float("inf"))
    problem.optimizer.step()
    problem.call(4)
    assert problem.optimizer.skipped_steps == 1


def test_a_copy_follows_what_was_written_before_it():
    problem = Small("momentum", dtype=torch.float64, **FIXED)
    problem.call(3)
    with torch.no_grad():
        decay(problem.model.parameters())
    other = Small("momentum", dtype=torch.float64, **FIXED)
    other.model, other.optimizer = copy.deepcopy((problem.model, problem.optimizer))
    for one in (problem, other):
        one.call(2)
    for weight, expected in zip(weights(problem), weights(other), strict=True):
        assert relative_error(weight, expected) < 1e-10


def test_a_failed_freeze_leaves_ranks_to_adapt():
    problem = Small("momentum", tau=None, rank_policy=tdlrt.RelativeTolerance(0.3, spare=1.0))
    problem.call(2)
    keep = problem.layers[1].core.detach().clone()
    with torch.no_grad():
        problem.layers[1].core.fill_(float("nan"))
    with pytest.raises(tdlrt.NonFiniteError):
        problem.optimizer.freeze_ranks()
    assert not problem.optimizer.ranks_frozen
    with torch.no_grad():
        problem.layers[1].core.copy_(keep)
    problem.call()
    problem.optimizer.freeze_ranks()
    ranks = problem.ranks
    problem.call(3)
    assert problem.ranks == ranks


def turn(layer, *, through_data=False):
    """Other bases of the same ranges, and the core in them: the same weight."""
    with torch.no_grad():
        for mode in (0, 1):
            size = layer.ranks[mode]
            turned = torch.linalg.qr(gaussian((size, size), mode, layer.core.dtype))[0]
            basis = layer.factors[mode] @ turned
            core = turned.T @ layer.core if mode == 0 else layer.core @ turned
            if through_data:
                layer.factors[mode].data.copy_(basis)
                layer.core.data.copy_(core)
            else:
                layer.factors[mode].copy_(basis)
                layer.core.copy_(core)


def assert_follows(problem, layer, look, **options):
    """The first moments as tensors stay when bases are turned and the optimiser looks."""
    before = moments_in_full(problem, layer)
    assert before
    turn(layer, **options)
    look()
    after = moments_in_full(problem, layer)
    assert before.keys() == after.keys()
    for name, moment in after.items():
        assert relative_error(moment, before[name]) < 1e-9


LINEAR_WITH_STATE = pytest.mark.parametrize("optimizer_name", ["momentum", "adam", "amsgrad"])
THROUGH_DATA = pytest.mark.parametrize("through_data", [False, True], ids=["in place", "data"])


@THROUGH_DATA
@LINEAR_WITH_STATE
@pytest.mark.parametrize(("integrator", "calls"), [("parallel", 1), ("bug", 2)])
def test_the_state_follows_right_after_a_change_of_ranks(
    integrator, calls, optimizer_name, through_data
):
    problem = Small(optimizer_name, integrator=integrator, dtype=torch.float64, tau=0.5)
    before = problem.ranks
    problem.call(calls)
    assert all(now != then for now, then in zip(problem.ranks, before, strict=True))
    look = problem.optimizer.state_dict
    assert_follows(problem, problem.layers[1], look, through_data=through_data)


@THROUGH_DATA
@LINEAR_WITH_STATE
@INTEGRATORS
def test_the_state_follows_right_after_it_was_loaded(integrator, optimizer_name, through_data):
    options = {"integrator": integrator, "dtype": torch.float64, **FIXED}
    problem, other = (Small(optimizer_name, **options) for _ in range(2))
    problem.call(4)
    other.model.load_state_dict(copy.deepcopy(problem.model.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(problem.optimizer.state_dict()))
    look = other.optimizer.state_dict
    assert_follows(other, other.layers[1], look, through_data=through_data)


@LINEAR_WITH_STATE
@pytest.mark.parametrize("failing_call", [2, 3])
def test_the_state_follows_right_after_a_closure_that_failed(optimizer_name, failing_call):
    options = {"integrator": "bug", "core_steps": 2, "dtype": torch.float64, "tau": 0.5}
    problem, calls = Small(optimizer_name, **options), []
    problem.call(3)

    def closure():
        calls.append(problem.backward())
        if len(calls) == failing_call:
            raise KeyboardInterrupt
        return calls[-1]

    with pytest.raises(KeyboardInterrupt):
        problem.optimizer.step(closure)
    assert_follows(problem, problem.layers[1], problem.optimizer.state_dict)


def test_a_state_loaded_before_its_weights_waits_for_them():
    """With the same ranks nothing tells the order, and the state is not moved to other bases."""
    problem, other, twin = (Small("adam", seed=seed, **FIXED) for seed in (0, 1, 0))
    for one in (problem, twin):
        one.call(3)
    other.optimizer.load_state_dict(copy.deepcopy(problem.optimizer.state_dict()))
    other.model.load_state_dict(copy.deepcopy(problem.model.state_dict()))
    for one in (other, twin):
        one.call(2)
    assert_same(twin.model.state_dict(), other.model.state_dict())


@THROUGH_DATA
@LINEAR_WITH_STATE
@INTEGRATORS
def test_the_state_of_a_resting_layer_follows_while_other_ranks_change(
    integrator, optimizer_name, through_data
):
    problem = Small(optimizer_name, integrator=integrator, dtype=torch.float64, tau=0.0)
    problem.call(4)
    problem.optimizer.rank_policy = tdlrt.RelativeTolerance(0.7)
    ranks = problem.ranks[0]

    def look():
        for _ in range(2):
            problem.backward()
            for parameter in problem.layers[1].parameters():
                parameter.grad = None
            problem.optimizer.step()
        assert problem.ranks[0] != ranks

    assert_follows(problem, problem.layers[1], look, through_data=through_data)


@THROUGH_DATA
@LINEAR_WITH_STATE
@INTEGRATORS
def test_the_state_of_a_frozen_layer_follows(integrator, optimizer_name, through_data):
    problem = Small(optimizer_name, integrator=integrator, dtype=torch.float64, **FIXED)
    problem.call(4)
    layer = problem.layers[1]
    layer.requires_grad_(False)
    problem.call(2)

    def look():
        problem.call(2)
        layer.requires_grad_(True)
        problem.optimizer.state_dict()

    assert_follows(problem, layer, look, through_data=through_data)


def alike(**options):
    """A problem with two layers of one batch."""
    problem = Small(dtype=torch.float64)
    sizes = [nn.Linear(18, size, dtype=torch.float64) for size in (18, 18, 4)]
    problem.model = nn.Sequential(nn.Flatten(), sizes[0], nn.Tanh(), sizes[1], nn.Tanh(), sizes[2])
    tdlrt.factorize_(problem.model, rank=6)
    options = {"lr": 0.05, "momentum": 0.9, **FIXED, **options}
    problem.optimizer = tdlrt.TDLRT(problem.model, torch.optim.SGD, **options)
    return problem


@THROUGH_DATA
@INTEGRATORS
@pytest.mark.parametrize("frozen", [0, 1], ids=["another was frozen", "it was frozen itself"])
def test_a_turn_changes_no_step_after_a_layer_was_frozen(frozen, integrator, through_data):
    """Right after the unfreezing, with and without other steps in between."""
    for calls in (0, 2):
        problems = [alike(integrator=integrator) for _ in range(2)]
        for problem, turns in zip(problems, (True, False), strict=True):
            if frozen == 1:
                problem.call(4)
            problem.layers[frozen].requires_grad_(False)
            problem.call(4)
            if turns:
                turn(problem.layers[1], through_data=through_data)
            problem.call(calls)
            problem.layers[frozen].requires_grad_(True)
            problem.call(4)
        for weight, expected in zip(*map(weights, problems), strict=True):
            assert relative_error(weight, expected) < 1e-9


@INTEGRATORS
def test_dependent_columns_of_a_frozen_layer_are_refused_once_it_is_trained(integrator):
    problem = Small("momentum", integrator=integrator, **FIXED)
    problem.call(2)
    layer = problem.layers[1]
    layer.requires_grad_(False)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    problem.call(4)
    problem.optimizer.state_dict()
    assert not any(parameter.any() for parameter in layer.parameters())
    layer.requires_grad_(True)
    problem.backward()
    with pytest.raises(tdlrt.IntegratorStateError, match=r"3\.factors\.0: got a basis"):
        problem.optimizer.step()


@THROUGH_DATA
@LINEAR_WITH_STATE
def test_the_state_of_the_core_follows_between_the_passes_of_bug(optimizer_name, through_data):
    problem = Small(optimizer_name, integrator="bug", dtype=torch.float64, **FIXED)
    problem.call(3)
    layer = problem.layers[1]

    def in_full():
        state = problem.optimizer.state[layer.core]
        name = "momentum_buffer" if "momentum_buffer" in state else "exp_avg"
        return layer.factors[0] @ state[name] @ layer.factors[1].T

    before = in_full().detach()
    squares = problem.optimizer.state[layer.core].get("exp_avg_sq", torch.ones(1)).clone()
    turn(layer, through_data=through_data)
    problem.optimizer.state_dict()
    assert relative_error(in_full(), before) < 1e-10
    after = problem.optimizer.state[layer.core].get("exp_avg_sq", torch.ones(1))
    assert after.min() >= squares.min() * (1 - 1e-9)
    assert after.max() <= squares.max() * (1 + 1e-9)
    problem.call(3)


@THROUGH_DATA
def test_weights_written_between_the_passes_of_bug_are_those_of_the_next(through_data):
    """A turn does not change the weight, so that the step is the same without a state."""
    problems = [Small("sgd", integrator="bug", dtype=torch.float64, tau=0.2) for _ in range(2)]
    for problem in problems:
        problem.call(3)
    turn(problems[0].layers[1], through_data=through_data)
    for problem in problems:
        problem.call()
    for weight, expected in zip(*map(weights, problems), strict=True):
        assert relative_error(weight, expected) < 1e-9


def test_a_freeze_takes_the_weights_that_the_model_has():
    policy = tdlrt.RelativeTolerance(0.1, spare=0.5)
    problem = Small("momentum", tau=None, rank_policy=policy, dtype=torch.float64)
    problem.call(2)
    with torch.no_grad():
        through_data(problem.model.parameters())
    before = weights(problem)
    problem.optimizer.freeze_ranks()
    for weight, expected in zip(weights(problem), before, strict=True):
        assert relative_error(weight, expected) < 0.15


def test_a_model_that_changes_its_type_goes_on_in_it():
    model = nn.Sequential(nn.Linear(6, 6, bias=False))  # torch's own optimiser refuses it
    tdlrt.factorize_(model, rank=3, include="*")
    optimizer = tdlrt.TDLRT(model, torch.optim.Adam, lr=0.1, **FIXED)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.eye(6, dtype=dtype)).square().sum().backward()
            optimizer.step()
    core = model[0].core
    assert optimizer.state[core]["exp_avg"].dtype == torch.float64
    assert not torch.equal(core, core.float().double())


def test_the_state_of_a_core_in_other_bases_equals_its_formula():
    """Two members of different ranks in one stack; a mode that is not factorised stays."""
    sizes, ranks = [(6, 3, 5), (7, 3, 4)], [(2, 3, 2), (3, 3, 2)]
    layout = Layout(sizes, ranks, (0, 2))
    stacks, wanted = {"exp_avg": [], "exp_avg_sq": []}, {"exp_avg": [], "exp_avg_sq": []}
    bases = {0: [[], []], 2: [[], []]}
    for place, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
        moment = gaussian(rank, place)
        turns = {}
        for mode in (0, 2):
            old, new = (
                torch.linalg.qr(gaussian((size[mode], rank[mode]), 10 * place + 2 * mode + side))[0]
                for side in (0, 1)
            )
            turns[mode] = new.T @ old
            for of, basis in zip(bases[mode], (old, new), strict=True):
                of.append(padded(basis, (layout.rows[mode], layout.columns[mode])))
        shares = {}
        for mode, turn in turns.items():
            squares = turn.square()
            rest = 1 - squares.sum(dim=1, keepdim=True)
            shares[mode] = squares + rest / rank[mode]  # rows of sum 1
        for name, given, of in (
            ("exp_avg", moment, turns),
            ("exp_avg_sq", moment.square(), shares),
        ):
            stacks[name].append(padded(given, layout.columns))
            expected = torch.einsum("abc,xa,yc->xby", given, of[0], of[2])
            wanted[name].append(padded(expected, layout.columns))
    found = core_brought_along(
        {name: torch.stack(of) for name, of in stacks.items()},
        [torch.stack(bases[0][0]), None, torch.stack(bases[2][0])],
        [torch.stack(bases[0][1]), None, torch.stack(bases[2][1])],
        layout,
        AdamRule,
    )
    for name, of in wanted.items():
        assert relative_error(found[name], torch.stack(of)) < 1e-12


def padded(tensor, shape):
    result = torch.zeros(shape, dtype=tensor.dtype)
    result[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return result
