"""Steps that read nothing on the host, and whole training steps as CUDA graphs."""

import copy
import math

import pytest
import torch
from torch import nn

import tdlrt
from optim.problems import OPTIMIZERS, Small, assert_same, tucker_layers

FIXED = {"tau": None, "rank_policy": tdlrt.FixedRank()}
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_capturable_step_is_the_ordinary_one(name):
    problem, twin = (
        Small(name, **FIXED, dtype=torch.float64, capturable=capturable)
        for capturable in (False, True)
    )
    for one in (problem, twin):
        one.call(4)
    for found, expected in zip(twin.model.parameters(), problem.model.parameters(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8)
    assert all(isinstance(group["lr"], torch.Tensor) for group in twin.optimizer.param_groups)


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_a_capturable_step_of_some_members_of_a_batch_is_the_ordinary_one(name):
    """A layer without a gradient rests; curvatures and steps count as in the ordinary step."""
    optimizer_cls, options = OPTIMIZERS[name]
    options = options | {"lr": 1e-4}  # a tensor in float32, whose rounding must not grow
    found = []
    for capturable in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(12, 12, dtype=torch.float64) for _ in range(4)))
        tdlrt.factorize_(model, rank=4)
        optimizer = tdlrt.TDLRT(model, optimizer_cls, capturable=capturable, **FIXED, **options)
        for step in range(4):
            optimizer.zero_grad()
            model(torch.eye(12, dtype=torch.float64)).square().sum().backward()
            for parameter in model[step % 2].parameters():
                parameter.grad = None
            optimizer.step()
        found.append((model.state_dict(), optimizer.state_dict()["tdlrt"]))
    (weights, own), (others, their) = found
    for key, weight in weights.items():
        assert torch.allclose(others[key], weight, rtol=1e-6, atol=1e-8)
    assert own["steps"] == their["steps"] == 4
    assert own["curvatures"].keys() == their["curvatures"].keys()
    for key, curvature in own["curvatures"].items():
        assert torch.allclose(their["curvatures"][key], curvature, rtol=1e-6)


def test_it_reads_nothing_on_the_host(monkeypatch):
    problem = Small("momentum", **FIXED, capturable=True)
    problem.call(3)
    problem.backward()

    def refuse(tensor, *args):
        raise AssertionError("a value was read")

    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    # torch's own SGD on the CPU reads a rate that is a tensor.
    monkeypatch.setattr(problem.optimizer._engine.plain, "move", lambda groups: None)
    problem.optimizer.step()


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_step_that_is_not_finite_changes_nothing_on_the_device(name):
    problem = Small(name, **FIXED, capturable=True, skip_nonfinite=1)
    problem.call(2)
    for parameter in (problem.layers[1].core, problem.model[-1].weight):
        before = copy.deepcopy(
            (problem.model.state_dict(), problem.optimizer.state_dict()["state"])
        )
        problem.backward()
        parameter.grad[0, 0] = math.nan
        problem.optimizer.step()
        after = (problem.model.state_dict(), problem.optimizer.state_dict()["state"])
        assert_same(before, after)
        problem.optimizer.count_skipped()
        problem.call()
    assert problem.optimizer.skipped_steps == 2
    for _ in range(2):
        problem.backward()
        problem.layers[0].core.grad[0] = math.inf
        problem.optimizer.step()
    with pytest.raises(tdlrt.NonFiniteError, match="the last 2 steps were not finite"):
        problem.optimizer.count_skipped()
    assert problem.optimizer.skipped_steps == 4


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_first_step_that_is_not_finite_leaves_no_trace(name):
    problem, twin = (
        Small(name, **FIXED, dtype=torch.float64, capturable=True, skip_nonfinite=1)
        for _ in range(2)
    )
    problem.backward()
    problem.model[-1].weight.grad[0, 0] = math.nan
    problem.optimizer.step()
    for one in (problem, twin):
        one.call(2)
    for found, expected in zip(problem.model.parameters(), twin.model.parameters(), strict=True):
        assert found.isfinite().all()
        if name == "adamw":  # the first momentum of SGD is the gradient, without dampening
            assert torch.allclose(found, expected)


def test_a_scheduler_changes_the_rate_in_place():
    problem = Small("momentum", **FIXED, capturable=True)
    rate = problem.optimizer.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.StepLR(problem.optimizer, 1, gamma=0.5)
    problem.call()
    scheduler.step()
    assert problem.optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.025)


@pytest.mark.parametrize("options", [{}, {"capturable": True, "integrator": "bug"}])
def test_an_optimizer_that_cannot_be_captured(options):
    problem = Small(**options)
    with pytest.raises(tdlrt.IntegratorStateError, match="expected capturable=True and 'parallel'"):
        tdlrt.GraphedStep(problem.optimizer, problem.loss)


def graphed(problem, device):
    """Losses of steps by `GraphedStep`, and the ranks."""
    inputs, labels = problem.inputs.to(device), problem.labels.to(device)
    step = tdlrt.GraphedStep(
        problem.optimizer, lambda x, y: nn.functional.cross_entropy(problem.model(x), y)
    )
    return [float(step(inputs, labels)) for _ in range(30)], problem.ranks


def test_on_a_cpu_it_is_the_ordinary_loop():
    options = {"tau": 0.3, "adapt_every": 5}
    losses, ranks = graphed(Small(**options, capturable=True), "cpu")
    problem = Small(**options)
    for loss in losses:
        assert problem.loss().item() == pytest.approx(loss, rel=1e-4)
        problem.call()
    assert ranks == problem.ranks


@CUDA
@pytest.mark.parametrize("name", ["momentum", "adam", "adamw"])
def test_a_graph_takes_the_steps_of_the_loop(name):
    results = []
    for capturable in (True, False):
        problem = Small(name, tau=0.3, adapt_every=10)
        model = problem.model.cuda()
        optimizer_cls, defaults = OPTIMIZERS[name]
        problem.optimizer = tdlrt.TDLRT(
            model, optimizer_cls, **defaults, tau=0.3, adapt_every=10, capturable=capturable
        )
        problem.inputs, problem.labels = problem.inputs.cuda(), problem.labels.cuda()
        if capturable:
            losses, _ = graphed(problem, "cuda")
        else:
            losses = []
            for _ in range(30):
                losses.append(float(problem.backward()))
                problem.optimizer.step()
        results.append((losses, problem.ranks))
    assert results[0][1] == results[1][1]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)


@CUDA
def test_a_graph_is_captured_anew_when_ranks_change(monkeypatch):
    captures, capture = [], tdlrt.GraphedStep._capture
    monkeypatch.setattr(
        tdlrt.GraphedStep, "_capture", lambda self, i: captures.append(1) or capture(self, i)
    )
    problem = Small("momentum")
    model = problem.model.cuda()
    problem.optimizer = tdlrt.TDLRT(
        model, torch.optim.SGD, lr=0.05, tau=0.5, adapt_every=10, capturable=True
    )
    ranks = [layer.ranks for layer in tucker_layers(model)]
    graphed(problem, "cuda")
    assert [layer.ranks for layer in tucker_layers(model)] != ranks
    assert len(captures) >= 2


def test_steps_skipped_on_the_device_are_raised_by_the_next_examination():
    problem = Small("momentum", tau=0.3, adapt_every=4, capturable=True, skip_nonfinite=1)
    problem.call(4)
    for _ in range(3):
        problem.backward()
        problem.layers[0].core.grad[0] = math.nan
        problem.optimizer.step()
    problem.backward()
    with pytest.raises(tdlrt.NonFiniteError, match="the last 3 steps were not finite"):
        problem.optimizer.step()
    assert problem.optimizer.skipped_steps == 3


def test_a_good_examination_starts_the_count_of_skips_anew():
    problem = Small("momentum", tau=0.3, adapt_every=2, capturable=True, skip_nonfinite=1)
    for _ in range(3):
        problem.backward()
        problem.layers[0].core.grad[0] = math.nan
        problem.optimizer.step()
        problem.call()
    assert problem.optimizer.skipped_steps == 3


def test_what_a_graph_refers_to_is_known_to_be_gone():
    problem = Small("momentum", tau=0.5, adapt_every=2, freeze_after=6, capturable=True)
    problem.call()
    version = problem.optimizer.storage_version
    assert problem.optimizer.examines_next
    problem.call()
    assert problem.optimizer.storage_version != version  # ranks have changed
    problem.call()
    version = problem.optimizer.storage_version
    problem.backward()
    assert problem.optimizer.storage_version == version
    problem.model.load_state_dict(Small("momentum", rank=0.5).model.state_dict())
    assert problem.optimizer.storage_version != version
    problem.optimizer.freeze_ranks()


def test_a_rate_that_was_loaded_is_a_tensor():
    problem, plain = Small("momentum", **FIXED, capturable=True), Small("momentum", **FIXED)
    plain.call(2)
    version = problem.optimizer.storage_version
    problem.optimizer.load_state_dict(copy.deepcopy(plain.optimizer.state_dict()))
    assert isinstance(problem.optimizer.param_groups[0]["lr"], torch.Tensor)
    assert problem.optimizer.storage_version != version
    problem.call()


def test_freezing_by_count_is_no_step_to_replay():
    policy = tdlrt.RelativeTolerance(0.3, spare=1.0)
    options = {"tau": None, "rank_policy": policy, "adapt_every": 100, "freeze_after": 3}
    problem = Small("momentum", **options, capturable=True)
    problem.call(2)
    assert problem.optimizer.examines_next
    problem.call()
    assert problem.optimizer.ranks_frozen
    assert not problem.optimizer.examines_next
