"""TDLRT in the training loops of users: schedulers, checkpoints, accumulation, AMP, averages."""

import copy
import io
import linecache
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import tdlrt
from optim.problems import (
    EVERY_OPTIMIZER,
    INTEGRATORS,
    OPTIMIZERS,
    Regression,
    Small,
    assert_same,
    optimizer_for,
)
from reference.cases import relative_error
from tdlrt.linalg import orthonormality_error, orthonormality_tolerance

TESTS = Path(__file__).parents[1]


def assert_state_fits(problem):
    """Every tensor of the state has its Parameter's shape, and no mean of squares is negative."""
    seen = 0
    for parameter, state in problem.optimizer.state.items():
        for key, value in state.items():
            if value.ndim:
                assert value.shape == parameter.shape
                seen += 1
            if key.endswith("_sq"):
                assert (value >= 0).all()
    return seen


def assert_orthonormal(layers):
    for layer in layers:
        layer.check_invariants()
        for basis in layer.factors:
            allowed = orthonormality_tolerance(basis.dtype, len(basis))
            assert orthonormality_error(basis.detach()) <= allowed


# --- every optimiser ----------------------------------------------------------------------------


@INTEGRATORS
@EVERY_OPTIMIZER
def test_every_optimizer_learns_and_keeps_the_books(optimizer_name, integrator):
    problem = Small(optimizer_name, integrator=integrator, tau=0.3)
    before = {name: p.detach().clone() for name, p in problem.model.named_parameters()}
    parameters, ranks = list(problem.model.parameters()), problem.ranks
    first = problem.sign * problem.loss().item()
    calls = 1 if integrator == "parallel" else 2
    for step in range(25 * calls):
        problem.call()
        if step % 7 < 2:  # at rest, and between the halves of a step of `bug`
            stateful = assert_state_fits(problem)
    assert (stateful > 0) == (optimizer_name != "sgd")
    assert problem.sign * problem.loss().item() < 0.9 * first
    assert problem.ranks != ranks
    assert all(own is old for own, old in zip(problem.model.parameters(), parameters, strict=True))
    for name, parameter in problem.model.named_parameters():
        if not (parameter.ndim == 2 and parameter.shape[0] == parameter.shape[1]):  # a full basis
            moved = parameter.shape != before[name].shape
            assert moved or not torch.equal(parameter, before[name]), name
    assert_orthonormal(problem.layers)


@INTEGRATORS
@pytest.mark.parametrize("optimizer_name", ["momentum", "adamw"])
def test_bases_are_orthonormal_after_200_steps(optimizer_name, integrator):
    problem = Small(optimizer_name, integrator=integrator, tau=0.15, weight_decay=5e-3)
    problem.step(200)
    assert_orthonormal(problem.layers)
    assert_state_fits(problem)


@INTEGRATORS
@EVERY_OPTIMIZER
def test_other_parameters_follow_torch_exactly(optimizer_name, integrator):
    problem = Small(optimizer_name, integrator=integrator, weight_decay=0.01, tau=0.3)
    names = ["0.bias", "3.bias", "5.weight", "5.bias"]
    own = [problem.model.get_parameter(name) for name in names]
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in own]
    optimizer_cls, options = OPTIMIZERS[optimizer_name]
    plain = optimizer_cls(twins, weight_decay=0.01, **options)
    for call in range(8):
        problem.backward()
        for parameter, twin in zip(own, twins, strict=True):
            twin.grad = parameter.grad.clone()
        problem.optimizer.step()
        if integrator == "parallel" or call % 2:  # the basis step of `bug` does not move them
            plain.step()
        for parameter, twin in zip(own, twins, strict=True):
            assert torch.equal(parameter, twin)


def full_rank_pair(optimizer_name, integrator, **options):
    """A layer of full ranks under TDLRT, the same layer dense under torch, both as steps."""
    problem = Regression("conv2d", rank="full")
    dense = problem.layer.to_dense()
    optimizer_cls, defaults = OPTIMIZERS[optimizer_name]
    options = defaults | {"weight_decay": 0.02} | options
    fixed = tdlrt.FixedRank()
    own = tdlrt.TDLRT(
        problem.model, optimizer_cls, rank_policy=fixed, integrator=integrator, **options
    )
    plain = optimizer_cls(dense.parameters(), **options)

    def step():
        own.step(problem.closure)
        plain.zero_grad()
        problem.loss(dense(problem.inputs)).backward()
        plain.step()
        assert relative_error(problem.layer.dense_weight(), dense.weight) < 1e-12
        assert relative_error(problem.layer.bias, dense.bias) < 1e-12

    return own, plain, step


@INTEGRATORS
@EVERY_OPTIMIZER
def test_full_rank_is_the_plain_optimizer(optimizer_name, integrator):
    *_, step = full_rank_pair(optimizer_name, integrator, lr=0.01)
    for _ in range(5):
        step()


# --- checkpoints --------------------------------------------------------------------------------


def saved(problem):
    file = io.BytesIO()
    torch.save(
        {"model": problem.model.state_dict(), "optimizer": problem.optimizer.state_dict()}, file
    )
    file.seek(0)
    return file


def load(problem, file):
    states = torch.load(file, weights_only=True)
    problem.model.load_state_dict(states["model"])
    problem.optimizer.load_state_dict(states["optimizer"])


def unfinished(optimizer_name, integrator, seed=0):
    """After 5 calls, with core_steps=2 between the two core steps of `bug`."""
    core_steps = 2 if integrator == "bug" else 1
    options = {"integrator": integrator, "core_steps": core_steps, "tau": 0.3}
    return Small(optimizer_name, seed=seed, **options)


@INTEGRATORS
@EVERY_OPTIMIZER
def test_save_load_continue_equals_continue(optimizer_name, integrator):
    problem = unfinished(optimizer_name, integrator)
    start = problem.ranks
    problem.call(5)
    assert problem.ranks != start
    other = unfinished(optimizer_name, integrator, seed=1)
    load(other, saved(problem))
    problem.call(5)
    other.call(5)
    assert_same(problem.model.state_dict(), other.model.state_dict())
    assert_same(problem.optimizer.state_dict(), other.optimizer.state_dict())


CONTINUE = """
import sys
import torch
torch.set_num_threads(1)
from optim.test_loops import load, saved, unfinished
for case in sys.argv[2:]:
    problem = unfinished(*case.split("-"), seed=1)
    path = f"{sys.argv[1]}/{case}.pt"
    load(problem, path)
    problem.call(3)
    open(path, "wb").write(saved(problem).read())
"""


def test_a_fresh_process_continues_bit_for_bit(tmp_path):
    problems = {}
    for name in OPTIMIZERS:
        for integrator in ("parallel", "bug"):
            problem = problems[f"{name}-{integrator}"] = unfinished(name, integrator)
            problem.call(5)
            (tmp_path / f"{name}-{integrator}.pt").write_bytes(saved(problem).read())
            problem.call(3)
    subprocess.run([sys.executable, "-c", CONTINUE, tmp_path, *problems], check=True, cwd=TESTS)
    for case, problem in problems.items():
        theirs = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        assert_same(problem.model.state_dict(), theirs["model"])
        assert_same(problem.optimizer.state_dict(), theirs["optimizer"])


@INTEGRATORS
@pytest.mark.parametrize("optimizer_name", ["momentum", "adamw"])
def test_a_state_that_is_loaded_without_a_file_is_not_shared(optimizer_name, integrator):
    problem, other = (unfinished(optimizer_name, integrator) for _ in range(2))
    problem.call(5)
    other.model.load_state_dict(problem.model.state_dict())
    other.optimizer.load_state_dict(problem.optimizer.state_dict())
    problem.call(4)
    other.call(4)
    assert_same(problem.model.state_dict(), other.model.state_dict())


def test_a_loaded_state_goes_on_under_the_policy_of_its_new_optimizer():
    problem = Small(tau=0.0)
    problem.step(2)
    other = Small(tau=None, rank_policy=tdlrt.RelativeTolerance(0.0, max_rank=2))
    load(other, saved(problem))
    assert other.ranks == problem.ranks
    assert max(max(ranks) for ranks in other.ranks) > 2
    other.step()
    assert other.optimizer.rank_policy.max_rank == 2
    assert max(max(ranks) for ranks in other.ranks) == 2


def test_a_state_of_another_optimizer_class_is_refused():
    problem, other = Small("adam"), Small("momentum")
    problem.step()
    other.model.load_state_dict(problem.model.state_dict())
    before = copy.deepcopy(other.optimizer.state_dict())
    with pytest.raises(tdlrt.IntegratorStateError, match="of Adam, expected one of SGD"):
        other.optimizer.load_state_dict(problem.optimizer.state_dict())
    assert_same(before, other.optimizer.state_dict())


# --- schedulers ---------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda _: 0.8),
    "StepLR": lambda o: schedulers.StepLR(o, 3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.2),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 10),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 3), schedulers.StepLR(o, 1, 0.5)], [3]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.001, 0.02, step_size_up=3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.02, total_steps=12),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_changes_all_groups_as_it_does_in_torch(scheduler):
    problem = Small("momentum", lr=0.01, param_groups=[])
    plain = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.01, momentum=0.9)
    own, twin = (SCHEDULERS[scheduler](o) for o in (problem.optimizer, plain))
    seen = set()
    for _ in range(8):
        problem.call()
        plain.step()
        for one in (own, twin):
            one.step(1.0) if scheduler == "ReduceLROnPlateau" else one.step()
        expected = {key: plain.param_groups[0][key] for key in ("lr", "momentum")}
        seen.add(expected["lr"])
        for group in problem.optimizer.param_groups:
            assert {key: group[key] for key in expected} == expected
    assert len(seen) > 1


@INTEGRATORS
@pytest.mark.parametrize("optimizer_name", ["momentum", "adamw"])
@pytest.mark.parametrize("scheduler", ["CyclicLR", "OneCycleLR"])
def test_the_rule_sees_cycled_momentum_and_betas(scheduler, optimizer_name, integrator):
    own, plain, step = full_rank_pair(optimizer_name, integrator, lr=0.01)
    pair = [SCHEDULERS[scheduler](optimizer) for optimizer in (own, plain)]
    key = "momentum" if optimizer_name == "momentum" else "betas"
    cycled = set()
    for _ in range(6):
        step()  # compares the weights
        for one in pair:
            one.step()
        assert own.param_groups[0][key] == plain.param_groups[0][key]
        cycled.add(plain.param_groups[0][key])
    assert len(cycled) > 2


# --- gradient accumulation ----------------------------------------------------------------------


@INTEGRATORS
@pytest.mark.parametrize("optimizer_name", ["momentum", "adamw"])
def test_four_micro_batches_equal_one_batch(optimizer_name, integrator):
    # With rank above the batch size `bug` adds directions that rounding chooses; and a direction
    # of Adam is as exact as eps is large.
    options = {"integrator": integrator, "dtype": torch.float64, "tau": 0.4, "rank": 0.5}
    if optimizer_name == "adamw":
        options["eps"] = 1e-4
    whole, parts = Small(optimizer_name, **options), Small(optimizer_name, **options)
    start = whole.ranks
    for _ in range(6):
        whole.call()
        parts.optimizer.zero_grad()
        for rows in torch.arange(8).chunk(4):
            (parts.loss(rows) / 4).backward()
        parts.optimizer.step()
        assert parts.ranks == whole.ranks
        for one, other in zip(whole.layers, parts.layers, strict=True):
            assert relative_error(one.dense_weight(), other.dense_weight()) < 1e-12
    assert whole.ranks != start


def gradients(problem):
    return {name: p.grad.clone() for name, p in problem.model.named_parameters()}


@INTEGRATORS
def test_a_rank_change_starts_an_accumulation_anew(integrator):
    problem = Small(tau=0.5, integrator=integrator)
    start = problem.ranks
    problem.call()  # and no zero_grad
    assert all(one != other for one, other in zip(start, problem.ranks, strict=True))
    for layer in problem.layers:
        assert all(parameter.grad is None for parameter in [layer.core, *layer.factors])
    old = problem.model[5].weight.grad.clone()
    problem.loss().backward()
    accumulated = gradients(problem)
    problem.optimizer.zero_grad()
    problem.loss().backward()
    for name, fresh in gradients(problem).items():
        if "core" in name or "factors" in name:
            assert torch.equal(accumulated[name], fresh)
    assert torch.allclose(accumulated["5.weight"], problem.model[5].weight.grad + old)


def test_freezing_in_the_middle_of_an_accumulation_drops_what_was_accumulated():
    policy = tdlrt.RelativeTolerance(0.3, spare=1.0)
    problem = Small(tau=None, rank_policy=policy)
    problem.step(3)
    ranks = problem.ranks
    problem.backward()
    problem.optimizer.freeze_ranks()
    changed = [one != other for one, other in zip(ranks, problem.ranks, strict=True)]
    assert any(changed)
    for layer, was_changed in zip(problem.layers, changed, strict=True):
        assert (layer.core.grad is None) == was_changed


def change_by_step(problem):
    problem.backward()
    problem.optimizer.step()


def change_by_loading(problem):
    problem.model.load_state_dict(Small(rank=0.3).model.state_dict())


@INTEGRATORS
@pytest.mark.parametrize("change", [change_by_step, change_by_loading])
def test_a_graph_from_before_a_rank_change_raises(change, integrator):
    problem = Small(tau=0.5, integrator=integrator)
    ranks = problem.ranks
    loss = problem.loss()
    change(problem)
    assert problem.ranks != ranks
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- mixed precision ----------------------------------------------------------------------------


@INTEGRATORS
@pytest.mark.parametrize("optimizer_name", ["momentum", "adamw"])
def test_bf16_autocast_trains(optimizer_name, integrator):
    problem = Small(optimizer_name, integrator=integrator, tau=0.3)
    first = problem.loss().item()
    for _ in range(40):
        problem.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = problem.loss()
        loss.backward()
        problem.optimizer.step()
    assert problem.loss().item() < 0.9 * first
    assert all(parameter.dtype == torch.float32 for parameter in problem.model.parameters())
    assert_orthonormal(problem.layers)


def scaled_call(problem, scaler, *, poison=None):
    problem.optimizer.zero_grad()
    scaler.scale(problem.loss()).backward()
    if poison is not None:
        poison.grad.view(-1)[0] = math.inf
    scaler.unscale_(problem.optimizer)
    scaler.step(problem.optimizer)
    scaler.update()


@INTEGRATORS
@pytest.mark.parametrize("optimizer_name", ["momentum", "adamw"])
def test_a_scaled_training_is_the_unscaled_one(optimizer_name, integrator):
    options = {"integrator": integrator, "tau": 0.3}
    plain, scaled = Small(optimizer_name, **options), Small(optimizer_name, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(6):
        plain.call()
        scaled_call(scaled, scaler)
    assert_same(plain.model.state_dict(), scaled.model.state_dict())  # a power of 2 rounds nothing


@pytest.mark.parametrize(("integrator", "calls"), [("parallel", 3), ("bug", 4), ("bug", 5)])
@pytest.mark.parametrize("where", ["0.core", "0.factors.1", "5.weight"])
def test_an_infinite_gradient_skips_the_step(where, integrator, calls):
    problem = Small("adamw", integrator=integrator, tau=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(calls):
        scaled_call(problem, scaler)
    before = copy.deepcopy((problem.model.state_dict(), problem.optimizer.state_dict()))
    scaled_call(problem, scaler, poison=problem.model.get_parameter(where))
    assert_same(before, (problem.model.state_dict(), problem.optimizer.state_dict()))
    assert before[1]["tdlrt"]["core_steps_left"] == (calls % 2 if integrator == "bug" else 0)
    assert scaler.get_scale() == 2.0**9
    scaled_call(problem, scaler)


def test_a_gradient_scaler_takes_no_closure():
    problem = Small()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(problem.loss()).backward()
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(problem.optimizer, closure=problem.backward)


def test_a_closure_by_position_escapes_torchs_check():
    """The document warns of it: the step is not scaled, and not skipped either."""
    problem, twin = Small(), Small()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(problem.loss()).backward()
    scaler.step(problem.optimizer, problem.backward)
    twin.step()
    assert_same(problem.model.state_dict(), twin.model.state_dict())


# --- averages of weights ------------------------------------------------------------------------


@INTEGRATORS
def test_the_average_of_dense_copies_is_the_average_of_the_weights(integrator):
    problem = Small(dtype=torch.float64, tau=0.5, integrator=integrator)
    problem.step()
    average = torch.optim.swa_utils.AveragedModel(
        tdlrt.to_dense(problem.model), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    expected, ranks = None, set()
    for _ in range(6):
        problem.step()
        ranks.add(problem.layers[0].ranks)
        average.update_parameters(tdlrt.to_dense(problem.model))
        weight = problem.layers[0].dense_weight().detach()
        expected = weight if expected is None else 0.9 * expected + 0.1 * weight
    assert len(ranks) > 1
    assert relative_error(average.module[0].weight, expected) < 1e-14
    tdlrt.factorize_(average.module, rank=tdlrt.RelativeTolerance(0.05))
    assert relative_error(average.module[0].dense_weight(), expected) <= 0.05


def test_an_average_of_factors_fails_at_a_rank_change():
    problem = Small(tau=0.5)
    average = torch.optim.swa_utils.AveragedModel(problem.model)
    average.update_parameters(problem.model)
    problem.step()
    with pytest.raises(RuntimeError, match="size"):
        average.update_parameters(problem.model)


def test_an_average_of_factors_broadcasts_a_rank_of_one():
    """Why the document does not leave it to torch to notice."""
    model = nn.Sequential(tdlrt.nn.TuckerLinear(8, 6, rank=3))
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    model.load_state_dict(nn.Sequential(tdlrt.nn.TuckerLinear(8, 6, rank=1)).state_dict())
    average.update_parameters(model)
    assert average.module[0].ranks == (3, 3)


def test_an_average_of_factors_is_not_an_average_of_weights():
    problem = Small(tau=None, rank_policy=tdlrt.FixedRank())
    layer = problem.layers[0]
    average = torch.optim.swa_utils.AveragedModel(problem.model)
    weights = []
    for _ in range(2):
        problem.step(20)
        average.update_parameters(problem.model)
        weights.append(layer.dense_weight().detach())
    error = relative_error(average.module[0].dense_weight(), sum(weights) / 2)
    assert error > 0.01
    with pytest.raises(tdlrt.IntegratorStateError, match="U\\^T U - I"):
        average.module[0].check_invariants()


# --- ranks that nobody looks at -----------------------------------------------------------------


@pytest.fixture
def five_steps_are_long(monkeypatch):
    monkeypatch.setattr("tdlrt.optim.adaptation._LONG_WITHOUT_ADAPTATION", 5)


def warnings_of(problem, steps=12):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problem.call(steps)
    return [str(warning.message) for warning in caught]


@INTEGRATORS
def test_a_user_is_told_once_that_ranks_are_not_examined(five_steps_are_long, integrator):
    problem = Small(adapt_every=100, integrator=integrator)
    calls = 5 if integrator == "parallel" else 10
    assert warnings_of(problem, calls - 1) == []
    with pytest.warns(UserWarning, match="not been examined") as caught:
        problem.call()
    assert len(caught) == 1
    assert warnings_of(problem, 3 * calls) == []


def test_the_warning_names_the_layer_and_says_what_to_do(five_steps_are_long):
    problem = Small()
    problem.layers[1].requires_grad_(False)
    (message,) = warnings_of(problem)
    assert message == (
        "the ranks of 3 have not been examined for 5 steps (adapt_every=10); lower adapt_every, "
        "check that these layers get a gradient, or call freeze_ranks()"
    )


@pytest.mark.parametrize("scheduled", [False, True], ids=["alone", "scheduled"])
@pytest.mark.parametrize("closure", [False, True], ids=["without a closure", "closure"])
@INTEGRATORS
def test_the_warning_is_at_the_line_of_the_user(
    five_steps_are_long, integrator, closure, scheduled
):
    problem = Small(adapt_every=100, integrator=integrator)
    if scheduled:  # it wraps step
        schedulers.StepLR(problem.optimizer, 1)
    with pytest.warns(UserWarning, match="not been examined") as caught:
        for _ in range(10):
            problem.backward()
            problem.optimizer.step(problem.backward if closure else None)
    (warning,) = caught
    assert warning.filename == __file__
    assert "problem.optimizer.step(" in linecache.getline(warning.filename, warning.lineno)


@pytest.mark.parametrize(
    "quiet", ["examined", "fixed", "frozen", "frozen by count", "after a load"]
)
def test_no_warning_where_ranks_are_meant_to_stay(five_steps_are_long, quiet):
    options = {
        "examined": {"adapt_every": 4},
        "fixed": {"rank_policy": tdlrt.FixedRank()},
        "frozen": {"adapt_every": 100},
        "frozen by count": {"adapt_every": 100, "freeze_after": 4},
        "after a load": {"adapt_every": 100},
    }
    problem = Small(**options[quiet])
    if quiet == "frozen":
        problem.optimizer.freeze_ranks()
    if quiet == "after a load":
        problem.call(4)
        load(problem, saved(problem))
        assert warnings_of(problem, 4) == []
        assert len(warnings_of(problem, 1)) == 1
    else:
        assert warnings_of(problem) == []


def test_ranks_freeze_after_so_many_whole_steps():
    for integrator, calls in (("parallel", 3), ("bug", 6)):
        problem = Small(integrator=integrator, tau=0.5, freeze_after=3)
        problem.call(calls - 1)
        assert not problem.optimizer.ranks_frozen
        problem.call()
        assert problem.optimizer.ranks_frozen
        ranks = problem.ranks
        problem.call(calls)
        assert problem.ranks == ranks


@pytest.mark.parametrize("freeze_after", [0, -1, 2.0, True])
def test_freeze_after_outside_its_range(freeze_after):
    with pytest.raises(ValueError, match=r"freeze_after: got .* expected an int of at least 1"):
        optimizer_for(Small().model, freeze_after=freeze_after)


# --- copies -------------------------------------------------------------------------------------


@INTEGRATORS
@EVERY_OPTIMIZER
@pytest.mark.parametrize("calls", [0, 3])
def test_a_copy_of_model_and_optimiser_goes_on_alone(optimizer_name, integrator, calls):
    problem = Small(optimizer_name, integrator=integrator, tau=0.3)
    scheduler = schedulers.StepLR(problem.optimizer, 2)
    problem.call(calls)
    other = Small(optimizer_name, integrator=integrator, tau=0.3)
    other.model, other.optimizer = copy.deepcopy((problem.model, problem.optimizer))
    before = copy.deepcopy((problem.model.state_dict(), problem.optimizer.state_dict()))
    other.call(4)
    assert_same(before, (problem.model.state_dict(), problem.optimizer.state_dict()))
    problem.call(4)
    assert_same(problem.model.state_dict(), other.model.state_dict())
    assert_same(problem.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"])
    scheduler.step()


@EVERY_OPTIMIZER
def test_an_optimiser_that_has_loaded_a_state_can_be_copied(optimizer_name):
    problem, other = Small(optimizer_name, tau=0.3), Small(optimizer_name, tau=0.3)
    problem.call(2)
    other.model.load_state_dict(problem.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(problem.optimizer.state_dict()))
    other.model, other.optimizer = copy.deepcopy((other.model, other.optimizer))
    problem.call(1)
    other.call(1)
    assert_same(problem.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("norm", [-1.0, float("nan"), "one", None, True])
def test_a_norm_to_clip_at_that_is_no_number_from_zero_is_refused(norm):
    problem = Small("sgd")
    with pytest.raises(ValueError, match=f"max_norm: got {norm!r}, expected a number from 0"):
        problem.optimizer.clip_grad_norm_(norm)


def test_what_is_no_state_is_refused():
    with pytest.raises(tdlrt.IntegratorStateError, match="state_dict: got int, expected"):
        Small("sgd").optimizer.load_state_dict(3)
