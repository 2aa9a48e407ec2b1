"""Names in files are text in a report, whatever language they are written in."""

import json
import re
from html.parser import HTMLParser

import pytest
from matplotlib.text import Text

from report_page.runs import spread_names, write_named_sweep
from tdlrt_lab.reports.collect import collect
from tdlrt_lab.reports.escaping import latex, markdown, markdown_code, shorten
from tdlrt_lab.reports.groups import sections
from tdlrt_lab.reports.write import write_report
from tdlrt_lab.run.results import RunDirectory

HOSTILE = (
    '"><script>alert(1)</script>',
    "' onload='alert(1)' {{ 7 * 7 }}&amp;",
    r"$\frac{$^^M\input{x}^^5c#1f5fa8",
    "](javascript:alert(1)) `a` | *** --> <!-- \u202e\n\0\x1b[2J",
)
"""Each means something in HTML, SVG, Jinja, LaTeX, Markdown, CSS or to a terminal."""


@pytest.fixture(
    scope="module",
    params=[HOSTILE[0], *(pytest.param(name, marks=pytest.mark.slow) for name in HOSTILE[1:])],
)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def report(name, tmp_path_factory):
    """A report in which every text is the same name."""
    root = tmp_path_factory.mktemp("named")
    write_named_sweep(root, name)
    return write_report(root).folder


class Page(HTMLParser):
    """The elements of a page with the names of their attributes, and some of their values."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.ids, self.values, self.texts = set(), [], [], []
        self.feed(html)

    def handle_data(self, data):
        self.texts.append(data)

    def handle_starttag(self, tag, attributes):
        self.elements.add((tag, frozenset(name for name, _ in attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        self.values += [value for name, value in attributes if name != "aria-label"]


ELEMENTS = set(
    "html head meta title style body header h1 h2 p em strong u section ul li code main div table "
    "thead tbody tr th td figure figcaption details summary pre "
    "svg defs g path use clippath rect text tspan".split()
)
ATTRIBUTES = set(
    "lang charset http-equiv name content class aria-label role tabindex scope id d style x y "
    "width height transform clip-path xlink:href version viewbox xmlns xmlns:xlink type".split()
)


def test_no_element_and_no_attribute_comes_from_a_name(report):
    page = Page((report / "index.html").read_text())
    assert {tag for tag, _ in page.elements} <= ELEMENTS
    assert set().union(*(names for _, names in page.elements)) <= ATTRIBUTES
    assert len(page.ids) == len(set(page.ids)) > 10
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", one) for one in page.ids)
    assert not any("alert(" in (value or "") for value in page.values)


def test_all_texts_arrive_as_they_are(report, name):
    shown = " ".join(name.replace("\0", r"\x00").replace("\x1b", r"\x1b").split())
    shown = shown.replace("\u202e", r"\u202e")
    assert "".join(Page((report / "index.html").read_text()).texts).count(shown) > 20


def test_a_page_runs_no_script(report):
    html = (report / "index.html").read_text()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert html.index("Content-Security-Policy") < html.index("<title>")
    assert "script" not in policy


def test_files_of_figures_are_named_by_words(report):
    for path in report.glob("figures/*"):
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,100}", path.name)


def test_tables_hold_no_markup(report):
    found = (report / "tables.md").read_text()
    lines = found.splitlines()
    for line in lines:
        bare = re.sub(r"`+ ?.*? ?`+:", "", line) if line.startswith("- ") else line
        bare = re.sub(r"\\[^A-Za-z0-9]", "", bare).replace("<ins>", "").replace("</ins>", "")
        assert not re.search(r"[<>`\[$]", bare), line
    (titles,) = {line.count("|") - line.count("\\|") for line in lines if line.startswith("|")}
    assert titles > 5
    tex = (report / "tables.tex").read_text()
    assert "^^" not in tex and "\\input" not in tex
    assert [line[0] for line in tex.splitlines() if "%" in line.replace("\\%", "")] == ["%"]


def test_sections_that_differ_in_special_letters_have_files_of_their_own(write_run, tmp_path):
    for number, name in enumerate(("a/b", "a:b", "A b", "...", "a" * 300)):
        spread = write_run(f"r{number}", method="dense", seed=number)
        for path in (spread.config, spread.summary):
            values = RunDirectory(spread.path)
            stored = values.read_config() if path == spread.config else values.read_summary()
            path.write_text(json.dumps({**stored, "model": f"x{name}", "data": "d"}))
    names = [section.name for section in sections(collect(tmp_path)[0])]
    assert len({name.lower() for name in names}) == 5
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) for name in names)


@pytest.mark.parametrize("text", [r"\frac $x$ a_b^2 #% & {} ~ [x] * < > |"])
def test_escapes(text):
    assert markdown("tensor_train, tau 0.1") == "tensor_train, tau 0.1"
    assert markdown("_a_ [b](c) <i>") == r"\_a\_ \[b\](c) \<i\>"
    assert markdown_code("a``b") == "``` a``b ```"
    assert latex(text) == (
        r"\textbackslash{}frac \$x\$ a\_b\textasciicircum{}2 \#\% \& \{\} \textasciitilde{} {[}x] "
        r"{*} \textless{} \textgreater{} \textbar{}"
    )
    assert (shorten("abc", 3), shorten("abcd", 3)) == ("abc", "ab…")


def test_formulas_in_names_are_not_read(write_run, tmp_path, monkeypatch):
    """A formula that matplotlib cannot read would end the report."""
    parsed, preprocess = [], Text._preprocess_math

    def note(self, text):
        parsed.append((text, preprocess(self, text)))
        return parsed[-1][1]

    monkeypatch.setattr(Text, "_preprocess_math", note)
    spread_names(write_run("a", tau=0.1, compression=0.5), r"$\frac{$")
    assert not [one for one in write_report(tmp_path).problems if "pictures" in one.text]
    assert all(not math for text, (_, math) in parsed if "frac" in text)
    assert any("frac" in text for text, _ in parsed)
