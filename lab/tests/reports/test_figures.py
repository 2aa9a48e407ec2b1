"""Which runs have a figure of their ranks."""

from dataclasses import replace

import pytest

from tdlrt_lab.reports.collect import collect
from tdlrt_lab.reports.figures import layer_figures
from tdlrt_lab.reports.groups import Group

RANKS = {"fc": [4, 4]}
MORE = {"fc": [9, 9]}


@pytest.mark.parametrize(
    ("changes", "last", "drawn"),
    [
        ([], RANKS, False),
        ([[0, RANKS]], RANKS, False),
        ([[0, MORE], [2, RANKS]], RANKS, True),
        ([[0, RANKS]], MORE, True),
        ([], MORE, True),
        ([[0, MORE], [2, RANKS]], {}, False),
    ],
    ids=["earlier", "still", "within an epoch", "later", "earlier and later", "none at the end"],
)
def test_ranks_that_move_are_drawn(write_run, tmp_path, changes, last, drawn):
    directory = write_run("a", compression=0.5)
    first, second, _ = directory.read_metrics()
    first = replace(first, ranks=RANKS, steps=4, rank_changes=changes)
    directory.write_metrics([first, replace(second, ranks=last, steps=8)])
    (run,), _ = collect(tmp_path)
    assert run.history[0].rank_changes == changes
    pictures = list(layer_figures(1, Group(runs=[run], label_parts={"method": "tdlrt"}), {}))
    assert [picture.name for picture in pictures] == ["ranks-1"] * drawn
