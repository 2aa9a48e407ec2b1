"""What a user's rank means for a weight."""

import pytest

import tdlrt
from tdlrt.linalg import Cutoff
from tdlrt.ranks import fraction_within_dense, initial_cutoff


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


@pytest.mark.parametrize(
    ("spec", "shape", "learned", "expected"),
    [
        (0.5, (64, 64), (0, 1), (26, 26)),  # 26^2 + 2 * 64 * 26 = 4004 of 4096
        (0.5, (20, 1, 5, 5), (0, 1, 2, 3), (9, 1, 5, 5)),
        (0.5, (4, 100), (0, 1), (3, 3)),  # a mode of 4 would start full
        (0.5, (64, 3, 3, 3), (0, 1, 2, 3), (18, 3, 3, 3)),  # no colour is given up
        (0.5, (4, 4, 3, 3), (0, 1, 2, 3), (3, 3, 3, 3)),
        (0.5, (4, 4, 3), (0, 1), (2, 3, 3)),  # the kernel has no basis
        (0.5, (1, 1, 5, 5), (0, 1, 2, 3), (1, 1, 1, 1)),  # nothing but the kernel to lower
        (0.5, (100, 300), (0, 1), 0.5),  # fits
        (1.0, (64, 64), (0, 1), 1.0),
        (40, (64, 64), (0, 1), 40),
        ((40, 40), (64, 64), (0, 1), (40, 40)),
        ("full", (64, 64), (0, 1), "full"),
    ],
)
def test_a_fraction_makes_no_layer_larger_than_dense(spec, shape, learned, expected):
    assert fraction_within_dense(spec, shape, learned) == expected
