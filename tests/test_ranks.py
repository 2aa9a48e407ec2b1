"""Rank policies."""

import dataclasses

import pytest
import torch

import tdlrt
from tdlrt.ranks import Candidate

VALUES = torch.tensor([16.0, 4.0, 1.0, 0.25, 0.01, 0.0])
NORM = float(VALUES.sum())


def keep(policy, modes=(0, 1), ranks=(6, 6, 6), step=1):
    core = torch.zeros(ranks)
    core.view(-1)[0] = NORM**0.5
    candidate = Candidate(core, ranks, ranks, modes)
    return policy.rules({"layer": candidate}, step)["layer"](0, VALUES)


@pytest.mark.parametrize(
    ("tau", "rank"), [(0.0, 6), (1e-6, 5), (0.1, 4), (0.16, 3), (0.4, 2), (0.9, 1)]
)
def test_smallest_rank_within_the_share_of_a_mode(tau, rank):
    assert keep(tdlrt.RelativeTolerance(tau)) == rank


def test_a_matrix_spends_the_whole_budget_at_once():
    policy = tdlrt.RelativeTolerance(0.23)  # tau^2 ||C||^2 = 1.12, half of it 0.56
    assert keep(policy) == 3
    assert keep(tdlrt.RelativeTolerance(0.25), ranks=(6, 6)) == 2
    assert keep(tdlrt.RelativeTolerance(0.25)) == 3


@pytest.mark.parametrize(
    ("bounds", "rank"),
    [
        ({"min_rank": 5}, 5),
        ({"max_rank": 2}, 2),
        ({"multiple_of": 4}, 4),
        ({"multiple_of": 5}, 5),
        ({"multiple_of": 8}, 6),
        ({"multiple_of": 4, "max_rank": 3}, 3),
        ({"min_rank": 9}, 6),
    ],
)
def test_bounds(bounds, rank):
    assert keep(tdlrt.RelativeTolerance(0.16, **bounds)) == rank


def test_fixed_rank_keeps_what_is_there():
    assert keep(tdlrt.FixedRank(), ranks=(4, 5, 6)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_rank": 0}, "min_rank: got 0, expected an int of at least 1"),
        ({"max_rank": 1.5}, "max_rank: got 1.5"),
        ({"multiple_of": True}, "multiple_of: got True"),
        ({"min_rank": 4, "max_rank": 3}, "max_rank: got 3, below min_rank=4"),
    ],
)
def test_bad_bounds(options, message):
    with pytest.raises(tdlrt.RankError, match=message):
        tdlrt.RelativeTolerance(0.1, **options)


def test_policies_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tdlrt.RelativeTolerance(0.1).tau = 0.2
