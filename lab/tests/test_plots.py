from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tdlrt_lab.run.metrics import EpochMetrics
from tdlrt_lab.run.plots import draw_plots, rank_figure
from tdlrt_lab.run.results import RunDirectory

FIRST = EpochMetrics(
    epoch=1,
    loss=2.0,
    train_accuracy=20.0,
    test_accuracy=30.0,
    compression=0.2,
    network_compression=0.1,
    parameters=1000,
    ranks={
        "fc": [9, 9],
        "conv1d": [4, 3, 2],
        "conv2d": [4, 3, 2, 2],
        "conv3d": [8, 4, 3, 3, 3],
        "reshaped": [4, 3, 3, 2, 2, 2],
    },
    lr=0.1,
    seconds=1.0,
)
TUCKER = [FIRST, replace(FIRST, epoch=2, loss=0.0, ranks={**FIRST.ranks, "fc": [2, 2]})]
DENSE = [replace(metrics, ranks={}, compression=0.0) for metrics in TUCKER]


@pytest.fixture
def draw(tmp_path):
    """Draw the plots of a run; gives the pixels of each picture by name."""

    def pictures(history, dense=(), method="tdlrt"):
        directory = RunDirectory(tmp_path)
        directory.write_metrics(history)
        if dense:
            directory.baseline.write_metrics(dense)
        draw_plots(directory, method)
        return {p.stem: np.asarray(Image.open(p).convert("RGB")) for p in directory.plots.iterdir()}

    return pictures


@pytest.mark.parametrize("history", [TUCKER, TUCKER[:1]], ids=["two epochs", "one epoch"])
def test_every_picture_shows_something(draw, history):
    pictures = draw(history)
    assert set(pictures) == {"accuracy", "loss", "compression", "ranks"}
    for pixels in pictures.values():
        coloured = np.abs(pixels.astype(int) - pixels.mean(axis=2, keepdims=True)).max(axis=2) > 60
        assert coloured.sum() > 50  # curves; axes and text are grey


def test_a_dense_run_has_no_ranks_to_show(draw):
    assert set(draw(DENSE, method="dense")) == {"accuracy", "loss"}


def test_free_factors_are_drawn_under_their_own_name(draw):
    tdlrt, tucker = draw(TUCKER), draw(TUCKER, method="tucker")
    same = {name: np.array_equal(tdlrt[name], tucker[name]) for name in tdlrt}
    assert same == {"accuracy": False, "loss": False, "compression": True, "ranks": True}


def test_the_baseline_is_drawn_beside_the_run(draw):
    alone = draw(TUCKER)
    beside = draw(TUCKER, [replace(metrics, test_accuracy=90.0, loss=0.5) for metrics in DENSE])
    for name, differs in {"accuracy": True, "loss": True, "ranks": False}.items():
        assert (not np.array_equal(alone[name], beside[name])) == differs


def line(figure, layer, mode=0):
    """Points of the line of a mode, and its style."""
    (axes,) = [axes for axes in figure.axes if axes.get_title() == layer]
    drawn = axes.lines[mode]
    xs, ys = drawn.get_data()
    return list(zip(xs.tolist(), ys.tolist(), strict=True)), drawn.get_drawstyle()


def test_ranks_are_drawn_as_steps_at_every_change():
    two = [[0, {"a": [9, 5], "b": [3, 3]}], [1, {"a": [4, 5]}], [3, {"a": [5, 5]}]]
    first = replace(FIRST, ranks={"a": [5, 5], "b": [3, 3]}, steps=4, rank_changes=two)
    last = replace(first, epoch=2, ranks={"a": [2, 5], "b": [3, 3]}, steps=8)
    figure = rank_figure([first, replace(last, rank_changes=[[6, {"a": [2, 5]}]])])
    expected = [(0, 9), (0.25, 4), (0.75, 5), (1, 5), (1.5, 2), (2, 2)]
    assert line(figure, "a") == (expected, "steps-post")
    assert line(figure, "b", mode=1) == ([(0, 3), (1, 3), (2, 3)], "steps-post")


def test_ranks_of_earlier_versions_are_drawn_by_epoch():
    assert line(rank_figure(TUCKER), "fc") == ([(1, 9), (2, 2)], "default")


def test_many_changes_are_drawn_in_part():
    changes = [[step, {"a": [step % 7, 1]}] for step in range(10_000)]
    metrics = replace(FIRST, ranks={"a": [1, 1]}, steps=10_000, rank_changes=changes)
    points, _ = line(rank_figure([metrics]), "a")
    assert 400 < len(points) <= 501
    assert points[0] == (0, 0) and points[-1] == (1, 1)
    assert all(rank == round(10_000 * epoch) % 7 for epoch, rank in points[:-1])


def test_a_run_that_is_decomposed_late_shows_ranks_from_then_on(draw):
    history = [replace(FIRST, ranks={}, compression=0.0), replace(FIRST, epoch=2)]
    assert set(draw(history, method="posthoc")) == {"accuracy", "loss", "compression", "ranks"}
    masked = [replace(metrics, ranks={}) for metrics in history]
    assert "compression" in draw(masked, method="snip")


def test_a_figure_of_hostile_size_is_drawn_in_part():
    many = replace(FIRST, ranks={f"l{n}": [2, 3] for n in range(3000)} | {"l1": [1] * 5000})
    figure = rank_figure([many])
    assert [axes.get_title() for axes in figure.axes] == [f"l{n}" for n in range(24)]
    assert [len(axes.lines) for axes in figure.axes[:3]] == [2, 16, 2]
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 2 + 16
    expected = "epoch (the first 24 of 3,000 layers) (the first 16 of 5,000 modes)"
    assert figure.get_supxlabel() == expected


def test_a_figure_says_nothing_of_parts_if_it_shows_all():
    assert rank_figure(TUCKER).get_supxlabel() == "epoch"
