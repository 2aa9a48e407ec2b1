"""`tdlrt report`: tables, pictures and a page from run directories."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tdlrt_lab.reports.tables import markdown_table, table_rows, table_titles
from tdlrt_lab.reports.write import write_report

__all__ = ["report"]


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with runs below it.")],
    latency: Annotated[
        int | None,
        typer.Option(
            help="Time each run's plain network on so many images, next to dense.",
            metavar="IMAGES",
            min=1,
            show_default="not measured",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Make tables and pictures of all runs below a folder.

    Writes DIR/report: index.html (one page, needs no network), tables.md,
    tables.tex and figures as SVG and PNG. Runs that failed or are not finished
    are named and left out.
    """

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    made = write_report(folder, latency_batch=latency, progress=progress)
    if as_json:
        tables = {
            section.title: [
                dict(zip(table_titles(section), (cell.text for cell in row), strict=True))
                for row in table_rows(section)
            ]
            for section in made.sections
        }
        problems = {problem.path: problem.text for problem in made.problems}
        print(json.dumps({"report": str(made.folder), "tables": tables, "problems": problems}))
        return
    for section in made.sections:
        print(f"{section.title}, {section.setting}\n\n{markdown_table(section)}\n")
    for problem in made.problems:
        print(f"{problem.path}: {problem.text}")
    print(f"page, tables and figures in {made.folder}")
