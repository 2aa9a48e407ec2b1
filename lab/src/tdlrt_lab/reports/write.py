"""Writing of a report: tables, figures and an HTML page."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment

from tdlrt.errors import RunError
from tdlrt_lab.reports.collect import Problem, Run, collect
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
from tdlrt_lab.run.environment import machine, versions
from tdlrt_lab.run.files import own_folder, read_object, write_text, writing
from tdlrt_lab.sweep.plan import DESCRIPTION

__all__ = ["Report", "read_description", "write_report"]

AGAIN = "write the report again"


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
        with drawing():
            pictures = comparison_figures(section), layer_figures(section, spectra)
            pages.append(_page(section, *pictures, folder / "figures", latency_batch))
    texts = read_description(root)
    _write(folder / "tables.md", _markdown(texts["title"], found, problems))
    _write(folder / "tables.tex", "\n\n".join(f"% {s.title}\n{latex_table(s)}" for s in found))
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
            problems.append(Problem(path=run.path, text=str(error)))
        else:
            run.summary.update(measured[run.path])
    record = {"batch_size": batch_size, "versions": versions()}
    record |= {"machine": machine(torch.device("cpu")), "runs": measured}
    _write(folder / "latency.json", json.dumps(record, indent=2))


def _read_spectra(runs: Sequence[Run], problems: list[Problem]) -> dict[str, Any]:
    found = {}
    for run in runs:
        try:
            found[run.path] = core_spectra(run)
        except RunError as error:
            problems.append(Problem(path=run.path, text=f"no singular values: {error}"))
    return found


def _page(
    section: Section,
    compared: Sequence[Picture],
    layers: Sequence[Picture],
    folder: Path,
    latency_batch: int | None,
) -> dict[str, Any]:
    """Write the figures of a section, and return the variables of its part of the page."""
    return {
        "title": section.title,
        "setting": section.setting,
        "latency": f"latency of {latency_batch} images" if latency_batch else "",
        "titles": table_titles(section),
        "rows": table_rows(section),
        "overview": [_store(section, picture, folder) for picture in compared],
        "layers": [_store(section, picture, folder) for picture in layers],
        "commands": [group.first.summary.get("command") or group.label for group in section.groups],
        "facts": provenance(run.summary for group in section.groups for run in group.runs),
    }


def _store(section: Section, picture: Picture, folder: Path) -> dict[str, str]:
    name = f"{section.name}-{picture.name}"
    label = f"{picture.caption} ({section.title})"
    with writing(folder / name, then=AGAIN):
        text = store(picture.figure, folder / name)
    svg = inline_svg(text, name, label)
    return {"svg": svg, "caption": picture.caption}


def read_description(root: Path) -> dict[str, str]:
    """Title and note of the sweep in a folder; a title made from its name if there is none."""
    try:
        found = read_object(root / DESCRIPTION, "description of a sweep")
        return {"title": str(found["title"]), "note": str(found["note"])}
    except (RunError, KeyError):
        return {"title": f"Runs in {root.resolve().name}", "note": ""}


def _markdown(title: str, found: Sequence[Section], problems: Sequence[Problem]) -> str:
    parts = [f"# {title}"]
    for section in found:
        parts += [f"## {section.title}", section.setting, markdown_table(section)]
    if problems:
        lines = [f"- `{problem.path}`: {problem.text}" for problem in problems]
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
        problems=[asdict(problem) for problem in problems],
        light=palette(dark=False),
        dark=palette(dark=True),
    )


def _write(path: Path, text: str) -> None:
    write_text(path, f"{text.rstrip()}\n", then=AGAIN)
