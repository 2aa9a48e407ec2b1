"""What a layout says about the members of a padded stack."""

import torch

from reference.cases import relative_error
from tdlrt.linalg import Layout


def test_layouts_know_their_members() -> None:
    layout = Layout([(5, 4, 3), (6, 3, 3)], [(2, 4, 3), (3, 2, 3)], (0, 1))
    assert (len(layout), layout.rows, layout.columns) == (2, (6, 4, 3), (3, 4, 3))
    assert layout.moving == (0, 1)
    assert layout.moves(0) is None
    assert layout.moves(1).tolist() == [False, True]
    assert layout.padding(0).tolist() == [[0, 0, 1], [0, 0, 0]]
    assert layout.padding(1).tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert layout.rank_tensor().tolist() == [[2, 4, 3], [3, 2, 3]]
    assert layout.spare(0).tolist() == [3, 3]
    assert layout.spare(1).tolist() == [0, 1]
    assert layout.entries().tolist() == [24, 18]
    shares = layout.column_shares(0, torch.float64)
    assert shares.tolist() == [[[1 / 2, 1 / 2, 0]], [[1 / 3, 1 / 3, 1 / 3]]]
    target = Layout([(5, 4, 3), (6, 3, 3)], [(1, 4, 3), (2, 2, 3)], (0, 1))
    shares = layout.shares(0, target, torch.float32)
    assert shares.shape == (2, 2, 3)
    assert torch.equal(shares[:, 0], layout.column_shares(0, torch.float32)[:, 0])
    assert not shares[0, 1].any()
    rows = layout.row_shares(0, torch.float64).reshape(2, 4, 3)
    assert relative_error(rows[0], torch.ones(4, 3).double() / 12) <= 1e-15
    assert relative_error(rows[1, :2], torch.ones(2, 3).double() / 6) <= 1e-15
    assert not rows[1, 2:].any()


def test_some_members_of_a_layout_keep_its_shape() -> None:
    layout = Layout([(5, 4), (6, 3), (4, 4)], [(2, 2), (3, 3), (1, 1)], (0, 1))
    some = layout.take([2, 0])
    assert (some.sizes, some.ranks) == (((4, 4), (5, 4)), ((1, 1), (2, 2)))
    assert (some.rows, some.columns) == ((6, 4), (3, 3))
    assert some.padding(0).tolist() == [[0, 1, 1], [0, 0, 1]]
    whole = Layout([(5, 4)], [(2, 2)], (0, 1))
    assert whole.padding(0) is None
    assert whole.take([0]).padding(0) is None
