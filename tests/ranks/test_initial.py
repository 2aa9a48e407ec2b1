"""What a user's rank means for a weight."""

import pytest

import tdlrt
from tdlrt.linalg import Cutoff
from tdlrt.ranks import initial_cutoff


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("full", Cutoff((8, 7, 3))),
        (0.5, Cutoff((4, 4, 3))),
        (5, Cutoff((5, 5, 3))),
        ((2, 7, 1), Cutoff((2, 7, 1))),
        (tdlrt.RelativeTolerance(0.1, max_rank=4), Cutoff((4, 4, 4), tau=0.1)),
    ],
)
def test_the_cutoff_at_the_start(spec, expected):
    assert initial_cutoff(spec, (8, 7, 3)) == expected
