"""Schedules of a tolerance or a budget."""

import pytest

import tdlrt
from tdlrt.ranks import Schedule


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (
            tdlrt.LinearSchedule(0.0, 0.4, steps=4),
            {0: 0.0, 1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 99: 0.4},
        ),
        (tdlrt.LinearSchedule(0.4, 0.0, steps=4), {0: 0.4, 1: 0.3, 4: 0.0, 5: 0.0}),
        (tdlrt.CubicSchedule(0.0, 0.8, steps=2), {0: 0.0, 1: 0.7, 2: 0.8, 50: 0.8}),
        (tdlrt.CubicSchedule(0.8, 0.0, steps=4), {0: 0.8, 1: 0.3375, 2: 0.1, 3: 0.0125, 4: 0.0}),
        (tdlrt.LinearSchedule(3, 1, steps=1), {0: 3, 1: 1, 2: 1}),
        (tdlrt.LinearSchedule(1, 0, steps=4, begin=2), {0: 1, 2: 1, 3: 0.75, 6: 0, 9: 0}),
        (tdlrt.CubicSchedule(1, 0, steps=2, begin=3), {3: 1, 4: 0.125, 5: 0, 6: 0}),
    ],
)
def test_values_of_a_schedule(schedule, values):
    for step, value in values.items():
        assert schedule.value(step) == pytest.approx(value, abs=1e-15)


class Steps(Schedule):
    """0.5 in the first two steps, 0.25 afterwards; says nothing of its end."""

    extremes = (0.25, 0.5)

    def value(self, step):
        return 0.5 if step <= 2 else 0.25


def test_frozen_ranks_meet_what_the_schedule_of_a_budget_ends_with():
    falling = tdlrt.LinearSchedule(40, 20, steps=4)
    assert tdlrt.ParameterBudget(parameters=falling, spare=0.5, min_rank=2).settled() == (
        tdlrt.ParameterBudget(parameters=20, min_rank=2)
    )
    cubic = tdlrt.CubicSchedule(0.5, 0.25, steps=4)
    assert tdlrt.ParameterBudget(cubic).settled() == tdlrt.ParameterBudget(0.25)
    unknown = Steps()
    assert tdlrt.ParameterBudget(unknown).settled().fraction is unknown


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tdlrt.LinearSchedule(0, 1, steps=0), "steps: got 0, expected an int of at least"),
        (lambda: tdlrt.LinearSchedule(0, 1, 3, begin=-1), "begin: got -1, expected an int of at"),
        (
            lambda: tdlrt.CubicSchedule(float("nan"), 1, steps=3),
            "start: got nan, expected a finite",
        ),
        (lambda: tdlrt.CubicSchedule(0, float("inf"), steps=3), "end: got inf"),
        (lambda: tdlrt.LinearSchedule(0, "1", steps=3), "end: got '1'"),
        (
            lambda: tdlrt.RelativeTolerance(tdlrt.LinearSchedule(0, 1, steps=3)),
            r"tau: got LinearSchedule.*expected a number in \[0, 1\)",
        ),
        (
            lambda: tdlrt.ParameterBudget(tdlrt.LinearSchedule(1, 0, steps=3)),
            r"fraction: got LinearSchedule.*expected a number in \(0, 1\]",
        ),
        (
            lambda: tdlrt.ParameterBudget(parameters=tdlrt.LinearSchedule(100, 0, steps=3)),
            "parameters: got LinearSchedule.*expected a number from 1",
        ),
    ],
)
def test_bad_schedules(make, message):
    with pytest.raises(tdlrt.RankError, match=message):
        make()
