import pytest

import tdlrt
from tdlrt.integrations.control import RankControl


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm: got 0.0, expected a positive number"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm: got nan"),
        ({"freeze_at_epoch": -1}, "freeze_at_epoch: got -1, expected a number of epochs"),
        ({"freeze_at_share": 1.5}, r"freeze_at_share: got 1\.5, expected a share in \[0, 1\]"),
        ({"freeze_at_share": 0.5, "freeze_at_epoch": 1}, "expected one of them"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(tdlrt.SetupError, match=message):
        RankControl(**options)
