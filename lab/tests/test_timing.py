import itertools

import pytest
import torch
from torch import nn

import tdlrt
from tdlrt_lab.run.timing import Case, compare_networks, median_seconds, weight_bytes


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_median_of_rounds_in_turn_without_the_first():
    clock = Clock()
    durations = {"a": itertools.chain([9.0, 1.0, 5.0, 2.0]), "b": itertools.repeat(0.5)}
    order = []

    def run(name):
        order.append(name)
        clock.now += next(durations[name])

    cases = {name: Case(run=lambda name=name: run(name), clock=clock) for name in durations}
    assert median_seconds(cases, rounds=3) == {"a": 2.0, "b": 0.5}
    assert order == ["a", "b"] * 4


def test_short_calls_are_timed_together_and_periods_whole():
    clock, calls = Clock(), []

    def run():
        calls.append(None)
        clock.now += 0.3 if len(calls) % 10 == 0 else 0.001

    assert Case(run=run, period=10, clock=clock).seconds() == pytest.approx(0.309 / 10)
    assert len(calls) == 10
    calls.clear()
    assert Case(run=lambda: calls.append(None), clock=clock).seconds() == 0.0
    assert len(calls) == 20


def test_networks_and_layers_are_compared():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 32), nn.Linear(32, 10)
    )
    before = [parameter.clone() for parameter in model.parameters()]
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    policy = tdlrt.RelativeTolerance(0.01)
    found = compare_networks(model, images, labels, 0.25, policy, rounds=1)
    dense, tucker = found["networks"]
    assert dense["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert tucker["parameters"] < dense["parameters"] / 2
    assert dense["bytes"] == weight_bytes(model) > 4 * dense["parameters"]
    assert min(dense["step_ms"], tucker["step_ms"], tucker["inference_ms"]) > 0
    assert [row["layer"] for row in found["layers"]] == ["0", "3"]
    assert found["layers"][1]["parameters"] == 8 * (16 * 36 + 32 + 8)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
