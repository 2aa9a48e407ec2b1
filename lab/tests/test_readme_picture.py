import pytest

from tdlrt_lab.sweep.plan import read_sweep


@pytest.fixture
def picture(script):
    return script("readme_picture")


def test_it_draws_the_results_that_the_readme_shows(picture, monkeypatch, tmp_path):
    monkeypatch.setattr(picture, "PICTURE", tmp_path / "accuracy.svg")
    picture.main()
    first = picture.PICTURE.read_bytes()
    picture.main()
    assert picture.PICTURE.read_bytes() == first


def test_points_and_bands_are_means_and_deviations(picture):
    results = picture.recorded("mnist_budget")
    sweep = read_sweep(picture.EXPERIMENTS["mnist_budget"])
    (axes,) = picture.draw([picture.compared(sweep, results)]).axes
    dense = [r["accuracy"] for r in results if r["method"] == "dense"]
    (line,) = [line for line in axes.lines if line.get_label() == "dense"]
    assert line.get_ydata()[0] == pytest.approx(sum(dense) / len(dense))
    points = [bar for bar in axes.containers if bar.get_label().startswith("TDLRT")]
    chosen = [r for r in results if r["method"] == "tdlrt" and r["budget"] == 0.05]
    shown = sorted((bar.lines[0].get_xydata()[0] for bar in points), key=lambda point: point[0])[0]
    assert shown[0] == pytest.approx(100 * sum(r["compression"] for r in chosen) / len(chosen))
    assert shown[1] == pytest.approx(sum(r["accuracy"] for r in chosen) / len(chosen))
