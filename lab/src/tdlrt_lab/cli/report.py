"""`tdlrt report`: tables, figures and an HTML page from run directories."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tdlrt_lab.cli.output import AsJson, Debug
from tdlrt_lab.reports.tables import markdown_table, table_rows, table_titles
from tdlrt_lab.reports.write import write_report

__all__ = ["report"]


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with run directories below it.")
    ],
    latency: Annotated[
        int | None,
        typer.Option(
            help="Batch size with which to time each run's plain network and the dense one.",
            metavar="IMAGES",
            min=1,
            show_default="not measured",
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write tables and figures of all runs below a folder.

    Writes DIR/report with index.html (self-contained), tables.md, tables.tex, and
    figures as SVG and PNG. Unfinished and failed runs are listed as problems.
    """

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    written = write_report(folder, latency_batch=latency, progress=progress)
    if as_json:
        tables = {
            section.title: [
                dict(zip(table_titles(section), (cell.text for cell in row), strict=True))
                for row in table_rows(section)
            ]
            for section in written.sections
        }
        problems = {problem.path: problem.text for problem in written.problems}
        print(json.dumps({"report": str(written.folder), "tables": tables, "problems": problems}))
        return
    for section in written.sections:
        heading = ", ".join(filter(None, (section.title, section.setting)))
        print(f"{heading}\n\n{markdown_table(section)}\n")
    for problem in written.problems:
        print(f"{problem.path}: {problem.text}")
    print(f"page, tables and figures in {written.folder}")
