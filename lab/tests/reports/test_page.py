"""The page in a browser, at the width of a phone and of a desk, light and dark."""

import pytest

from report_page.browser import BROWSER, NAMES, measure
from report_page.check import SETTINGS, complaints, read_reference
from report_page.runs import write_named_sweep
from tdlrt_lab.reports.write import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)}"),
]


@pytest.fixture(scope="module")
def page(shared_sweep):
    return write_report(shared_sweep).folder / "index.html"


@pytest.mark.parametrize(("width", "dark"), SETTINGS)
def test_everything_is_in_its_place_and_can_be_read(page, width, dark):
    seen = measure(page, width, dark)
    assert (seen["width"], seen["dark"]) == (width, dark)
    assert complaints(seen, read_reference()[width]) == [], "see docs/how-it-is-built.md"


WRONG = {
    "table wider than a phone": (
        ".box { overflow-x: auto;",
        ".box {",
        "pixels wide on a screen of 390",
    ),
    "pictures twice as high": ("width: 100%; height: auto;", "height: 590px;", "svg 1: at "),
    "captions gone": ("<figcaption>", "<figcaption hidden>", "figcaption 1: at [0, 0, 0, 0]"),
    "one heading more": ("<h1>", "<h1></h1><h1>", "h1 2: at "),
    "light grey on white": ("--soft: #555d68", "--soft: #9aa1aa", "contrast of 2."),
    "dark grey on black": ("--soft: #a9b1bb", "--soft: #5d656f", "contrast of 3."),
    "nearly transparent": ("figcaption {", "figcaption { opacity: .6;", "contrast of 2."),
    "tiny pictures": ("max-width: calc(1.3", "max-width: calc(.2", "pixels in a picture"),
    "pictures without a text": ("aria-label", "data-label", "figure 1: no text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(page, tmp_path, name):
    old, new, complaint = WRONG[name]
    html = page.read_text()
    assert old in html
    (tmp_path / "wrong.html").write_text(html.replace(old, new))
    seen = measure(tmp_path / "wrong.html", 390, dark="black" in name)
    found = complaints(seen, read_reference()[390])
    assert any(complaint in line for line in found), found


PAPER = 718
"""Pixels between the margins of A4."""


def test_on_paper_every_column_and_figure_is_there(page, tmp_path):
    html = page.read_text()
    assert html.count("@media print") == 1
    (tmp_path / "paper.html").write_text(html.replace("@media print", "@media screen"))
    seen = measure(tmp_path / "paper.html", PAPER, dark=False)
    assert seen["content"] <= PAPER
    boxes = seen["landmarks"]
    tables = [box for name, box in boxes.items() if name.startswith("table ")]
    figures = [box for name, box in boxes.items() if name.startswith("figure ")]
    assert all(x + width <= PAPER for x, _, width, _ in [*tables, *figures])
    # A4 has room for two of 490 pixels.
    assert all(0 < height <= 490 for *_, height in figures)
    assert sum(name.startswith("pre ") and box[3] > 0 for name, box in boxes.items()) >= 1


SCRIPT = "\"'></title></style><script>window.ran = 1</script><img src=x: onerror='window.ran = 2'>"


def test_no_name_runs_a_script(tmp_path):
    write_named_sweep(tmp_path, SCRIPT)
    page = write_report(tmp_path).folder / "index.html"
    seen = measure(page, 390, dark=False)
    assert (seen["ran"], "img 1" in seen["landmarks"]) == (0, False)


def test_the_policy_stops_scripts_that_are_there(page, tmp_path):
    html = page.read_text()
    for policy, ran in (("Content-Security-Policy", 0), ("no-policy", 1)):
        text = html.replace("Content-Security-Policy", policy).replace("<h1>", f"{SCRIPT[4:]}<h1>")
        assert text != html
        (tmp_path / f"{policy}.html").write_text(text)
        assert bool(measure(tmp_path / f"{policy}.html", 390, dark=False)["ran"]) is bool(ran)
