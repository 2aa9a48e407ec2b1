import json
import math
import re
from dataclasses import replace

import pytest

from tdlrt_lab.config import RunConfig
from tdlrt_lab.reports.style import DARK
from tdlrt_lab.reports.write import write_report
from tdlrt_lab.run.runner import run


@pytest.fixture(scope="module")
def report(shared_sweep):
    return write_report(shared_sweep)


@pytest.fixture(scope="module")
def html(report):
    return (report.folder / "index.html").read_text()


def test_tables_and_figures_are_written(report):
    assert (
        (report.folder / "tables.md").read_text().startswith("# All \\<methods\\>\n\n## lenet5 on")
    )
    assert "- `bad/seed0`: left out: failed" in (report.folder / "tables.md").read_text()
    assert (report.folder / "tables.tex").read_text().startswith("% lenet5 on digits\n\\begin")
    names = {path.stem for path in (report.folder / "figures").glob("*.svg")}
    assert {name.removeprefix("lenet5-digits-") for name in names} == {
        "accuracy-compression",
        "accuracy-time",
        "convergence",
        "sensitivity-rank",
        "sensitivity-tau",
        "ranks-2",
        "ranks-3",
        "ranks-4",
        "ranks-5",
        "spectra-2",
        "spectra-3",
        "spectra-4",
        "spectra-5",
    }
    assert names == {path.stem for path in (report.folder / "figures").glob("*.png")}


@pytest.mark.slow
def test_writing_it_again_gives_the_same_bytes(report, shared_sweep):
    before = {path: path.read_bytes() for path in report.folder.rglob("*") if path.is_file()}
    write_report(shared_sweep)
    assert before == {path: path.read_bytes() for path in before}


def test_the_page_stands_alone_and_escapes(html):
    assert not re.search(r'(src|href)="(?!#)', html)
    assert "@import" not in html and "url(http" not in html
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "<title>All &lt;methods&gt;</title>" in html
    assert "Small &amp; quick" in html


def test_every_picture_has_a_text_and_colours_of_the_page(html):
    pictures = re.findall(r"<svg [^>]*>", html)
    assert len(pictures) == 13
    for picture in pictures:
        assert 'role="img"' in picture
        assert re.search(r'aria-label="[^"]{20,}"', picture)
    used = set(re.findall(r"var\((--c[0-9a-f]{6})\)", html))
    assert used
    for name in used:
        assert html.count(f"{name}:") == 3  # light, dark and on paper
    for colour in DARK:
        assert f"fill: {colour}" not in html and f"stroke: {colour}" not in html
    ids = re.findall(r'<(?:clipPath|path) id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("dark", [False, True])
def test_contrast_is_enough(dark):
    page = "#1d2125" if dark else "#f6f7f9"
    for colour, other in DARK.items():
        if colour != "#d0d4d9":  # the grid
            assert contrast(other if dark else colour, page) > 3


def contrast(one, other):
    return (max(luminance(one), luminance(other)) + 0.05) / (
        min(luminance(one), luminance(other)) + 0.05
    )


def luminance(colour):
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.slow
def test_latency_of_real_runs(tmp_path):
    shared = {"model": "lenet5", "data": "digits", "epochs": 1, "batch_size": 256}
    for method, options in {"dense": {}, "tdlrt": {"budget": 0.2}}.items():
        run(RunConfig(**shared, method=method, **options), tmp_path / method)
    (tmp_path / "tdlrt2" / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        text = (tmp_path / "tdlrt" / name).read_text()
        text = text.replace("seed: 0", "seed: 7").replace('"seed": 0', '"seed": 7')
        (tmp_path / "tdlrt2" / name).write_text(text)
    (tmp_path / "tdlrt2" / "checkpoints" / "model.safetensors").write_bytes(b"torn")
    report = write_report(tmp_path, latency_batch=2)
    stored = json.loads((report.folder / "latency.json").read_text())
    assert stored["batch_size"] == 2
    assert stored["runs"].keys() == {"dense", "tdlrt"}
    assert min(value for row in stored["runs"].values() for value in row.values()) > 0
    assert (report.folder / "figures" / "lenet5-digits-accuracy-latency.svg").exists()
    assert "latency (ms)" in (report.folder / "tables.md").read_text()
    found = {(problem.path, problem.text.split(":")[0]) for problem in report.problems}
    assert found == {("tdlrt2", "no latency"), ("tdlrt2", "no singular values")}


def test_without_a_description_the_folder_is_the_title(sweep):
    (sweep / "sweep.json").write_text("[")
    folder = write_report(sweep).folder
    assert f"<title>Runs in {sweep.name}</title>" in (folder / "index.html").read_text()


def test_a_single_dense_run_has_a_report_too(write_run, tmp_path):
    write_run("a", method="dense")
    folder = write_report(tmp_path).folder
    names = {path.stem for path in (folder / "figures").glob("*.svg")}
    assert names == {"lenet5-digits-accuracy-time", "lenet5-digits-convergence"}


def test_an_epoch_that_is_not_finite_is_a_gap_in_a_curve(write_run, tmp_path):
    for seed in (0, 1):
        directory = write_run(f"seed{seed}", compression=0.5, seed=seed)
        first, *others = directory.read_metrics()
        if seed:
            directory.write_metrics([replace(first, loss=math.nan), *others])
    report = write_report(tmp_path)
    assert [problem.path for problem in report.problems] == ["seed1"]
    assert (report.folder / "index.html").exists()


def test_figures_of_text_show_bits_per_character(write_run, tmp_path):
    text = {"model": "gpt", "data": "stdlib"}
    write_run("dense", method="dense", bits=2.0, **text)
    write_run("small", budget=0.1, bits=2.5, compression=0.9, **text)
    report = write_report(tmp_path)
    assert report.problems == []
    figures = {path.stem: path for path in (report.folder / "figures").glob("*.svg")}
    for name in ("bits-per-character-compression", "bits-per-character-time", "convergence"):
        drawing = figures[f"gpt-stdlib-{name}"].read_text("utf-8")
        assert "bits per character" in drawing and "accuracy" not in drawing
    page = (report.folder / "index.html").read_text("utf-8")
    assert "Bits per character against compression" in page
