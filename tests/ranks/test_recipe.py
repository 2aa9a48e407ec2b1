"""How a budget falls in the course of a training."""

import itertools

import pytest

import tdlrt
from tdlrt.ranks import BudgetRecipe


def test_the_recipe_by_hand():
    recipe = BudgetRecipe(0.1, total_steps=1000, freeze_at=0.4, ramp_share=0.5, spare=0.3)
    assert recipe.freeze_after == 400
    ramp = tdlrt.LinearSchedule(0.5, 0.1, steps=200, begin=200)
    assert recipe.rank_policy == tdlrt.ParameterBudget(ramp, spare=0.3)
    assert recipe.rank_policy.settled() == tdlrt.ParameterBudget(0.1)
    shares = [ramp.value(step) for step in (1, 200, 300, 400, 1000)]
    assert shares == pytest.approx([0.5, 0.5, 0.3, 0.1, 0.1])


def test_cuts_are_of_one_size_and_the_budget_is_met_when_ranks_are_frozen():
    recipe = BudgetRecipe(0.1, total_steps=1000)
    steps = [10 * k for k in range(recipe.freeze_after // 10 + 1)]
    shares = [recipe.rank_policy.fraction.value(step) for step in steps]
    cuts = [before - after for before, after in itertools.pairwise(shares)]
    assert shares[-1] == 0.1
    assert max(cuts) == pytest.approx(0.4 * 10 / recipe.rank_policy.fraction.steps)
    assert sum(cut > 0 for cut in cuts[: len(cuts) // 4]) == 0


def test_a_budget_above_the_start_does_not_rise():
    recipe = BudgetRecipe(0.8, total_steps=100, ramp=tdlrt.LinearSchedule)
    assert recipe.rank_policy.fraction.extremes == (0.8, 0.8)


def test_a_training_of_one_step():
    recipe = BudgetRecipe(0.1, total_steps=1)
    assert (recipe.freeze_after, recipe.rank_policy.fraction.steps) == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, r"budget: got 0.0, expected a number in \(0, 1\]"),
        ({"budget": 5}, "budget: got 5"),
        ({"total_steps": 0}, "total_steps: got 0, expected an int of at least 1"),
        ({"total_steps": None}, "total_steps: got None"),
        ({"start": 1.5}, "start: got 1.5"),
        ({"freeze_at": 0.0}, "freeze_at: got 0.0"),
        ({"ramp_share": -0.1}, r"ramp_share: got -0.1, expected a number in \[0, 1\]"),
        ({"spare": -1.0}, "spare: got -1.0, expected a share of at least 0"),
        ({"adapt_every": 0}, "adapt_every: got 0"),
        ({"ramp": "cubic"}, "ramp: got 'cubic', expected the class LinearSchedule"),
        ({"ramp": tdlrt.CubicSchedule(0.5, 0.1, 10)}, "ramp: got CubicSchedule"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(tdlrt.RankError, match=message):
        BudgetRecipe(**({"budget": 0.1, "total_steps": 10} | options))
