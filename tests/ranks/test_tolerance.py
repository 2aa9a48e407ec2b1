"""The relative tolerance: bounds, schedules, spare directions."""

import dataclasses

import pytest

import tdlrt
from ranks.candidates import keep
from tdlrt.linalg import Cutoff


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


def test_the_cutoff_of_a_tolerance():
    policy = tdlrt.RelativeTolerance(
        tdlrt.LinearSchedule(0.0, 0.4, steps=4), min_rank=2, multiple_of=3, spare=0.5
    )
    expected = Cutoff((8, 7, 3), tau=0.4, min_rank=2, multiple_of=3, spare=0.5)
    assert policy.cutoff((8, 7, 3), 4) == expected
    assert policy.cutoff((8, 7, 3)) == expected._replace(tau=0.0)  # the start of the schedule
    bounded = dataclasses.replace(policy, max_rank=5)
    assert bounded.cutoff((8, 7, 3), 4) == expected._replace(limits=(5, 5, 5))


@pytest.mark.parametrize("tau", [tdlrt.LinearSchedule, tdlrt.CubicSchedule])
def test_a_tolerance_follows_its_schedule(tau):
    policy = tdlrt.RelativeTolerance(tau(0.0, 0.4, steps=10))
    ranks = [keep(policy, step=step) for step in range(1, 13)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-3:] == [keep(tdlrt.RelativeTolerance(0.4))] * 3 == [2, 2, 2]
    assert ranks[0] > 2


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"spare": 0.0}, 3),
        ({"spare": 0.01}, 4),  # rounded up
        ({"spare": 0.5}, 5),
        ({"spare": 9.0}, 6),  # no more than there are
        ({"spare": 0.5, "max_rank": 4}, 4),
        ({"spare": 0.01, "multiple_of": 3}, 6),
    ],
)
def test_spare_ranks_come_on_top(options, rank):
    policy = tdlrt.RelativeTolerance(0.16, **options)
    assert keep(policy) == rank
    if policy.spare:
        assert policy.settled() == dataclasses.replace(policy, spare=0.0)
    assert policy.settled().settled() == tdlrt.FixedRank()


@pytest.mark.parametrize("spare", [-0.1, float("nan"), float("inf"), "0.1", True])
@pytest.mark.parametrize("make", [tdlrt.RelativeTolerance, tdlrt.ParameterBudget])
def test_bad_spare(make, spare):
    with pytest.raises(tdlrt.RankError, match=r"spare: got .* expected a share of at least 0"):
        make(0.1, spare=spare)
