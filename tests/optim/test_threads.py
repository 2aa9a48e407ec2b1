"""Layers side by side in threads: the same steps, the same errors, torch's settings as before."""

import itertools
import os
import signal
import threading
import time

import pytest
import torch
from torch import nn

import tdlrt
from optim.problems import INTEGRATORS
from tdlrt.optim import threads
from tdlrt.optim.threads import by_layer

EVEN = {"a": 1e8, "b": 2e8, "c": 1e8}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_layers_run_at_the_same_time_and_come_in_their_order(two_threads):
    together = threading.Barrier(2, timeout=60)

    def work(name: str) -> tuple[str, int, bool]:
        if name != "a":
            together.wait()  # fails, unless another layer is under way
        return name.upper(), torch.get_num_threads(), torch.is_grad_enabled()

    results = by_layer(work, {"a": 1e8, "b": 1.1e8, "c": 1e8})
    assert results == {name: (name.upper(), 1, False) for name in "abc"}
    assert list(results) == ["a", "b", "c"]
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "work",
    [{}, {"a": 0.0, "b": 0.0}, {"a": 1e6, "b": 1e6}, {"a": 1e9, "b": 1e6}],
    ids=["none", "on a device", "small", "uneven"],
)
def test_stays_in_its_thread_where_others_would_not_help(work, two_threads):
    here = threading.get_ident()
    assert by_layer(lambda name: threading.get_ident(), work) == dict.fromkeys(work, here)


def test_one_thread_stays_one():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = threading.get_ident()
        assert set(by_layer(lambda name: threading.get_ident(), EVEN).values()) == {here}
    finally:
        torch.set_num_threads(before)


def test_the_first_layer_that_fails_is_the_one_reported_when_all_have_ended(two_threads):
    ended = []

    def fail(name: str) -> None:
        time.sleep(0.1 * (name == "c"))
        ended.append(name)
        if name != "a":
            raise ValueError(name)

    with pytest.raises(ValueError, match=r"^b$"):
        by_layer(fail, EVEN)
    assert sorted(ended) == ["a", "b", "c"]
    assert by_layer(str.upper, EVEN) == {name: name.upper() for name in "abc"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(two_threads):
    by_layer(str.upper, EVEN)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(int(by_layer(lambda name: name, EVEN) != {name: name for name in "abc"}))
    assert os.waitpid(child, 0)[1] == 0


def even_network() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [24, 30, 30, 30, 24]
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
    tdlrt.factorize_(model.double(), rank=0.5)
    return model


def train(model: nn.Module, optimizer: tdlrt.TDLRT) -> None:
    torch.manual_seed(1)
    inputs, target = torch.randn(32, 24).double(), torch.randn(32, 24).double()

    def closure():
        optimizer.zero_grad()
        loss = (model(inputs) - target).square().mean()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)


@INTEGRATORS
@pytest.mark.parametrize(
    "policy",
    [tdlrt.FixedRank(), tdlrt.RelativeTolerance(0.2), tdlrt.ParameterBudget(0.3)],
    ids=["fixed", "tolerance", "budget"],
)
def test_steps_are_those_of_one_thread(policy, integrator, two_threads, monkeypatch):
    weights, places = [], []
    for least in (float("inf"), 0.0):
        monkeypatch.setattr(threads, "_LEAST_WORK", least)
        model, seen = even_network(), set()
        optimizer = tdlrt.TDLRT(
            model, torch.optim.SGD, lr=0.1, momentum=0.9, rank_policy=policy, integrator=integrator
        )
        rule = optimizer._rule
        monkeypatch.setattr(
            optimizer, "_rule", lambda n, s=seen, r=rule: s.add(threading.get_ident()) or r(n)
        )
        train(model, optimizer)
        weights.append([module.weight for module in tdlrt.to_dense(model)])
        places.append(len(seen))
    assert places[0] == 1 < places[1]
    for alone, together in zip(*weights, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


def test_a_policy_is_asked_one_question_at_a_time(two_threads, monkeypatch):
    class Slow(tdlrt.RelativeTolerance):
        asked = most = 0

        def rules(self, candidates, step):
            Slow.asked += 1
            Slow.most = max(Slow.most, Slow.asked)
            time.sleep(0.01)
            Slow.asked -= 1
            return super().rules(candidates, step)

    monkeypatch.setattr(threads, "_LEAST_WORK", 0.0)
    model = even_network()
    optimizer = tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1, rank_policy=Slow(0.1))
    train(model, optimizer)
    assert Slow.most == 1
