"""What all policies share."""

import dataclasses

import pytest

import tdlrt
from ranks.candidates import keep
from tdlrt.ranks import ByName


def test_fixed_rank_keeps_what_is_there():
    assert keep(tdlrt.FixedRank(), ranks=(4, 5, 6)) == 4


@pytest.mark.parametrize(
    ("policy", "needed"),
    [
        (tdlrt.FixedRank(), False),
        (tdlrt.RelativeTolerance(0.1), False),
        (tdlrt.ParameterBudget(0.1), True),
        (ByName({"a": tdlrt.FixedRank(), "b": tdlrt.RelativeTolerance(0.1)}), False),
        (ByName({"a": tdlrt.FixedRank(), "b": tdlrt.ParameterBudget(0.1)}), True),
    ],
)
def test_only_a_budget_needs_spectra(policy, needed):
    assert policy.needs_spectra is needed


def test_policies_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tdlrt.RelativeTolerance(0.1).tau = 0.2
