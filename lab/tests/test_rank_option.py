import pytest

from tdlrt.errors import RankError
from tdlrt_lab.rank_option import check_rank, format_rank, parse_rank

READ = {
    "0.5": 0.5,
    "1": 1,
    "1.0": 1.0,
    "full": "full",
    "conv2=16x8x5x5,fc1=12x12,*=0.5": {"conv2": [16, 8, 5, 5], "fc1": [12, 12], "*": 0.5},
    "block?.conv[12]=full,*=3": {"block?.conv[12]": "full", "*": 3},
}


@pytest.mark.parametrize(("text", "rank"), READ.items())
def test_reading_and_writing_are_inverse(text, rank):
    assert parse_rank(text) == rank
    assert type(parse_rank(text)) is type(rank)
    assert format_rank(rank) == text
    assert check_rank(rank) == rank


def test_spaces_do_not_count():
    assert parse_rank("conv2 = 3x3, * = 0.5") == {"conv2": [3, 3], "*": 0.5}


@pytest.mark.parametrize("text", ["conv1=3,conv2", "=3", "conv1=3,", "conv1=3,conv1=4"])
def test_what_is_no_list_of_pairs(text):
    with pytest.raises(RankError, match=r"expected LAYER=RANK,LAYER=RANK"):
        parse_rank(text)


def test_tuples_become_lists():
    assert check_rank({"conv2": (3, 2, 5, 5)}) == {"conv2": [3, 2, 5, 5]}


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ({}, r"rank \{\}: expected at least one layer"),
        ({"fc1": 0}, r"rank of fc1 0: expected"),
        ({"fc1": 1.5}, r"rank of fc1 1\.5: expected"),
        ({"fc1": "half"}, r"rank of fc1 'half': expected"),
        ({"fc1": []}, r"rank of fc1 \[\]: expected"),
        ({"fc1": [3, 0]}, r"rank of fc1 \[3, 0\]: expected"),
        ({"fc1": [3, 2.0]}, r"rank of fc1 \[3, 2\.0\]: expected"),
        ({"fc1": [3, True]}, r"rank of fc1 \[3, True\]: expected"),
        ({"fc1": None}, r"rank of fc1 None: expected"),
        ({"": 3}, r"got '' as the name of a layer"),
        ({3: 3}, r"got 3 as the name of a layer"),
        (True, r"rank True: expected"),
        (None, r"rank None: expected"),
        ([3, 3], r"rank \[3, 3\]: expected"),
    ],
)
def test_bad_ranks(rank, message):
    with pytest.raises(RankError, match=message):
        check_rank(rank)
