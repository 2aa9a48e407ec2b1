"""The record of the changes of ranks is bounded, and continues as it would have."""

import json

import pytest

from tdlrt.files import MAX_TEXT
from tdlrt_lab.run import rank_changes
from tdlrt_lab.run.rank_changes import RankRecorder


def record(recorder, steps):
    return [c for n in steps for c in recorder.changes(n, {"a": [n, 1], "b": [2], "c": [n // 3]})]


def test_changed_layers_alone_are_recorded():
    expected = [
        [0, {"a": [0, 1], "b": [2], "c": [0]}],
        [1, {"a": [1, 1]}],
        [2, {"a": [2, 1]}],
        [3, {"a": [3, 1], "c": [1]}],
    ]
    assert record(RankRecorder(), range(4)) == expected


@pytest.mark.parametrize("stop", [1, 10, 90])
def test_a_long_record_ends_at_the_same_step_after_an_interruption(monkeypatch, stop):
    monkeypatch.setattr(rank_changes, "MAX_LETTERS", 1000)
    whole = record(RankRecorder(), range(100))
    assert 1000 <= len(json.dumps(whole)) < 1300
    assert len(whole) < 90
    first, second = RankRecorder(), RankRecorder()
    before = record(first, range(stop))
    second.restore({"a": [stop - 1, 1], "b": [2], "c": [(stop - 1) // 3]}, before)
    assert before + record(second, range(stop, 100)) == whole


def test_a_full_record_fits_into_a_line():
    assert rank_changes.MAX_LETTERS <= MAX_TEXT / 4
