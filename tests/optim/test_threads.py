"""Small steps use one of torch's threads, large ones all; the setting is as before afterwards."""

import pytest
import torch

import tdlrt
from optim.problems import Small
from tdlrt.optim.rules.sgd import SGDRule


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("least", "expected"), [(0.0, 2), (1e12, 1)])
def test_a_small_step_uses_one_thread(two_threads, monkeypatch, least, expected):
    monkeypatch.setattr("tdlrt.optim.threads._LEAST_WORK", least)
    problem, seen, advance = Small("sgd"), [], SGDRule.advance
    problem.call()  # which finds out how large a step is
    monkeypatch.setattr(
        SGDRule, "advance", lambda *of: seen.append(torch.get_num_threads()) or advance(*of)
    )
    problem.call()
    assert set(seen) == {expected}
    assert torch.get_num_threads() == 2


def test_the_threads_come_back_after_an_error(two_threads):
    problem = Small()
    problem.backward()
    problem.layers[0].core.grad[0] = float("nan")
    with pytest.raises(tdlrt.NonFiniteError):
        problem.optimizer.step()
    assert torch.get_num_threads() == 2
