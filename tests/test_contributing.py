"""CONTRIBUTING and the page on the structure name what exists, and leave nothing out."""

import importlib
import itertools
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SOURCES = {"tdlrt": ROOT / "src", "tdlrt_lab": ROOT / "lab" / "src"}
PLACE = re.compile(r"`([\w./]+\.py)`: ((?:`[\w.]+`(?:, )?)+)")


def table(heading):
    """The cells of the table below a heading, row by row."""
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


ANSWERS = dict(table("Which file to open"))
FLOORS = [re.findall(r"`([\w.]+)`", packages) for packages, _ in table("Where things are")]


def module_of(path):
    """The module in a file of one of the two packages."""
    (source,) = [source for source in SOURCES.values() if path.is_relative_to(source)]
    parts = path.relative_to(source).with_suffix("").parts
    return importlib.import_module(".".join(parts).removesuffix(".__init__"))


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_names_at_most_two_files_and_what_is_in_them(answer):
    places = PLACE.findall(answer)
    assert 1 <= len(places) <= 2
    assert {path for path, _ in places} == set(re.findall(r"`([\w./]+\.py)`", answer))
    for path, names in places:
        module = module_of(ROOT / path)
        for name in re.findall(r"`([\w.]+)`", names):
            thing = module
            for part in name.split("."):
                thing = getattr(thing, part)
            # Written there, not imported.
            assert getattr(thing, "__module__", module.__name__) == module.__name__


def test_every_question_of_a_newcomer_has_an_answer():
    asked = " ".join(ANSWERS)
    for word in ("momentum", "optimiser", "rank policy", "layer type", "baseline", "export format"):
        assert word in asked
    assert "forward path chosen" in asked
    assert "checkpoint format" in asked
    assert len(ANSWERS) == 8


def test_every_module_is_on_a_floor():
    existing = {
        f"{package}.{path.stem}"
        for package, source in SOURCES.items()
        for path in (source / package).iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.stem[0] != "_"
    }
    assert {name for floor in FLOORS for name in floor} == existing


def test_the_floors_stand_in_the_order_that_is_checked():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    height = {
        name: -number for number, layer in enumerate(layers) for name in re.split(r" \| ", layer)
    }
    heights = [[height[name] for name in floor] for floor in FLOORS]
    for above, below in itertools.pairwise(heights):
        assert min(above) >= max(below)


@pytest.mark.parametrize("package", ["nn", "optim", "paths", "ranks", "surgery"])
def test_how_it_is_built_names_every_file(package):
    page = (ROOT / "docs" / "how-it-is-built.md").read_text(encoding="utf-8")
    files = {path.name for path in (ROOT / "src" / "tdlrt" / package).glob("[!_]*.py")}
    assert sorted(name for name in files if name not in page) == []


def test_how_it_is_built_names_files_that_exist():
    page = (ROOT / "docs" / "how-it-is-built.md").read_text(encoding="utf-8")
    folders = (*SOURCES.values(), ROOT / "lab" / "tests", ROOT / "tests", ROOT / "benchmarks")
    files = [path.relative_to(ROOT).as_posix() for of in folders for path in of.rglob("*.py")]
    named = set(re.findall(r"`([\w/]+\.py)`", page))
    assert (
        sorted(name for name in named if not any(f"/{f}".endswith(f"/{name}") for f in files)) == []
    )
