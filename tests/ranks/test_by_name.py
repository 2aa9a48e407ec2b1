"""Policies by patterns of names."""

import pytest

import tdlrt
from ranks.candidates import chosen, diagonal
from tdlrt.ranks import ByName


def test_the_first_pattern_that_matches_wins_and_the_others_keep_their_ranks():
    layers = {name: diagonal(4.0, 3.0, 2.0, 1.0) for name in ("conv1", "conv2", "fc1", "fc2")}
    layers = {name: layer._replace(ranks=(3, 3)) for name, layer in layers.items()}
    policy = ByName(
        {
            "conv1": tdlrt.RelativeTolerance(0.0, max_rank=1),
            "conv*": tdlrt.RelativeTolerance(0.0, max_rank=2),
            "*2": tdlrt.RelativeTolerance(0.0),
        }
    )
    policy.check(layers)
    ranks = {name: ranks[0] for name, ranks in chosen(policy, layers).items()}
    assert ranks == {"conv1": 1, "conv2": 2, "fc1": 3, "fc2": 4}


def test_a_budget_by_name_counts_its_own_layers():
    layers = {name: diagonal(3.0, 2.0, 1.0) for name in ("a1", "a2", "b")}
    policy = ByName({"a*": tdlrt.ParameterBudget(0.45), "b": tdlrt.ParameterBudget(0.7)})
    assert chosen(policy, layers) == {"a1": [2, 2], "a2": [2, 2], "b": [3, 3]}


def test_a_pattern_without_a_layer_and_a_policy_that_is_none():
    layers = {"fc1": diagonal(1.0), "fc2": diagonal(1.0)}
    with pytest.raises(
        tdlrt.NothingMatchedError, match=r"rank_policy\['conv\*'\]: matches none.* fc1, fc2"
    ):
        ByName({"*": tdlrt.FixedRank(), "conv*": tdlrt.FixedRank()}).check(layers)
    with pytest.raises(tdlrt.RankError, match=r"rank_policy\['fc1'\]: got 0.1, expected a rank"):
        ByName({"fc1": 0.1})
    with pytest.raises(tdlrt.RankError, match=r"budget: got 0\.1, but the smallest"):
        ByName({"fc2": tdlrt.ParameterBudget(0.1)}).check(layers)


def test_a_pattern_whose_layers_are_all_taken():
    layers = {name: diagonal(2.0, 1.0) for name in ("conv1", "fc1")}
    policies = {"*": tdlrt.FixedRank(), "conv*": tdlrt.RelativeTolerance(0.1)}
    message = r"rank_policy\['conv\*'\]: earlier patterns take all of its layers; put this pattern"
    with pytest.raises(tdlrt.NothingMatchedError, match=message):
        ByName(policies).check(layers)
    ByName(dict(reversed(policies.items()))).check(layers)


def test_settled_policies_by_name():
    policy = ByName({"a": tdlrt.ParameterBudget(0.5, spare=0.1), "*": tdlrt.FixedRank()})
    expected = ByName({"a": tdlrt.ParameterBudget(0.5), "*": tdlrt.FixedRank()})
    assert policy.settled() == expected == expected.settled()
