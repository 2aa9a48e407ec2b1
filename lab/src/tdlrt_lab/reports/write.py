"""Writing of a report: tables, figures and an HTML page."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment

from tdlrt.errors import RunError
from tdlrt_lab.reports.collect import Problem, Run, collect, problem
from tdlrt_lab.reports.escaping import latex, markdown, markdown_code
from tdlrt_lab.reports.figures import Picture, comparison_figures, layer_figures
from tdlrt_lab.reports.groups import Section, sections
from tdlrt_lab.reports.stored import core_spectra, latency
from tdlrt_lab.reports.style import drawing, inline_svg, palette, store
from tdlrt_lab.reports.tables import (
    latex_table,
    markdown_table,
    provenance,
    table_rows,
    table_titles,
)
from tdlrt_lab.reports.values import printable
from tdlrt_lab.run.environment import machine, versions
from tdlrt_lab.run.files import own_folder, read_object, write_text, writing
from tdlrt_lab.sweep.plan import DESCRIPTION

__all__ = ["Report", "read_description", "write_report"]

AGAIN = "write the report again"

Spectra = Mapping[str, Sequence[Sequence[float]]]
"""Singular values by layer and mode."""

Drawn = dict[str, str]
"""A picture on the page: its SVG and its caption."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report that was written.

    Attributes:
        folder: The folder of the report.
        sections: Contents of the tables.
        problems: Runs that were left out or should be read with care.
    """

    folder: Path
    sections: list[Section]
    problems: list[Problem]


def write_report(
    root: str | Path,
    *,
    latency_batch: int | None = None,
    progress: Callable[[str], object] = lambda text: None,
) -> Report:
    """Read all run directories below `root` and write `root/report`.

    Args:
        root: The folder of a sweep, or any folder with run directories below it.
        latency_batch: Batch size with which to time a forward pass of each run's plain network and
            of the dense network on this CPU; None measures nothing.
        progress: Called with a description of each slow step before it starts.

    Raises:
        RunError: The folder does not exist or holds no run directories, or a file of the report
            cannot be written.
    """
    root = Path(root)
    runs, problems = collect(root)
    folder = root / "report"
    own_folder(folder / "figures", within=root)
    if latency_batch is not None:
        _add_latencies(runs, latency_batch, problems, progress, folder)
    spectra = _read_spectra(runs, problems)
    found = sections(runs)
    pages = []
    for section in found:
        progress(f"drawing {section.title}")
        with drawing(), writing(folder / "figures", then=AGAIN):
            pictures = _draw(section, spectra, folder / "figures", problems)
        pages.append(_page(section, *pictures, latency_batch))
    texts = read_description(root)
    _write(folder / "tables.md", _markdown(texts["title"], found, problems))
    _write(
        folder / "tables.tex", "\n\n".join(f"% {latex(s.title)}\n{latex_table(s)}" for s in found)
    )
    _write(folder / "index.html", _html(texts, len(runs), pages, problems))
    return Report(folder=folder, sections=found, problems=problems)


def _add_latencies(
    runs: Sequence[Run],
    batch_size: int,
    problems: list[Problem],
    progress: Callable[[str], object],
    folder: Path,
) -> None:
    """Add the latency to the summary of each run, and write all latencies to a file."""
    measured = {}
    for run in runs:
        progress(f"timing {run.path}")
        try:
            measured[run.path] = latency(run, batch_size)
        except RunError as error:
            problems.append(problem(run.path, error))
        else:
            run.summary.update(measured[run.path])
    record = {"batch_size": batch_size, "versions": versions()}
    record |= {"machine": machine(torch.device("cpu")), "runs": measured}
    _write(folder / "latency.json", json.dumps(record, indent=2))


def _read_spectra(runs: Sequence[Run], problems: list[Problem]) -> dict[Path, Spectra]:
    """Singular values of the cores by run directory."""
    found: dict[Path, Spectra] = {}
    for run in runs:
        with _noted(problems, run.path, "no singular values"):
            found[run.directory.path] = core_spectra(run)
    return found


def _draw(
    section: Section, spectra: dict[Path, Spectra], folder: Path, problems: list[Problem]
) -> tuple[list[Drawn], list[Drawn]]:
    """Write the figures of a section: those that compare groups, and those of layers."""
    compared: list[Drawn] = []
    layers: list[Drawn] = []
    with _noted(problems, section.title, "no pictures of the comparison"):
        compared += [_store(section, picture, folder) for picture in comparison_figures(section)]
    for number, group in enumerate(section.groups, start=1):
        with _noted(problems, group.first.path, "no pictures of the layers"):
            values = spectra.get(group.first.directory.path, {})
            pictures = layer_figures(number, group, values)
            layers += [_store(section, picture, folder) for picture in pictures]
    return compared, layers


@contextmanager
def _noted(problems: list[Problem], path: str, missing: str) -> Iterator[None]:
    """Turn an error into a problem: no damage to one run may end the report of the others."""
    try:
        yield
    except OSError:  # the report cannot be written
        raise
    except RunError as error:
        problems.append(problem(path, f"{missing}: {error}"))
    except Exception as error:
        problems.append(problem(path, f"{missing}: {type(error).__name__}: {error}"))


def _page(
    section: Section, compared: list[Drawn], layers: list[Drawn], latency_batch: int | None
) -> dict[str, Any]:
    """The variables of a section's part of the page."""
    return {
        "title": section.title,
        "setting": section.setting,
        "latency": f"latency of {latency_batch} images" if latency_batch else "",
        "titles": table_titles(section),
        "rows": table_rows(section),
        "overview": compared,
        "layers": layers,
        "commands": [group.first.summary.get("command") or group.label for group in section.groups],
        "facts": provenance(run.summary for group in section.groups for run in group.runs),
    }


def _store(section: Section, picture: Picture, folder: Path) -> Drawn:
    name = f"{section.name}-{picture.name}"
    label = f"{picture.caption} ({section.title})"
    svg = inline_svg(store(picture.figure, folder / name), name, label)
    return {"svg": svg, "caption": picture.caption}


def read_description(root: Path) -> dict[str, str]:
    """Title and note of the sweep in a folder; a title made from its name if there is none."""
    try:
        found = read_object(root / DESCRIPTION, "description of a sweep")
        return {name: printable(str(found[name])) for name in ("title", "note")}
    except (RunError, KeyError):
        return {"title": printable(f"Runs in {root.resolve().name}"), "note": ""}


def _markdown(title: str, found: Sequence[Section], problems: Sequence[Problem]) -> str:
    parts = [f"# {markdown(title)}"]
    for section in found:
        title, setting = markdown(section.title), markdown(section.setting)
        parts += [f"## {title}", setting, markdown_table(section)]
    if problems:
        lines = [f"- {markdown_code(one.path)}: {markdown(one.text)}" for one in problems]
        parts += ["## Problems", "\n".join(lines)]
    return "\n\n".join(part for part in parts if part)


def _html(
    texts: dict[str, str], count: int, pages: Sequence[dict[str, Any]], problems: Sequence[Problem]
) -> str:
    template = files("tdlrt_lab.reports").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        **texts,
        count=count,
        sections=pages,
        problems=[asdict(one) for one in problems],
        light=palette(dark=False),
        dark=palette(dark=True),
    )


def _write(path: Path, text: str) -> None:
    write_text(path, f"{text.rstrip()}\n", then=AGAIN)
