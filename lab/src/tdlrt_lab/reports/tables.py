"""The table of a section, as cells, as Markdown and as LaTeX."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tdlrt_lab.measures import ACCURACY, BITS
from tdlrt_lab.reports.escaping import latex, markdown
from tdlrt_lab.reports.groups import Section
from tdlrt_lab.spread import format_spread

__all__ = ["Cell", "latex_table", "markdown_table", "provenance", "table_rows", "table_titles"]

Mark = Literal["", "best", "second"]

COLUMNS: dict[str, tuple[str, float, int]] = {
    **{measure.title: (measure.name, 1, measure.digits) for measure in (BITS, ACCURACY)},
    "compression (%)": ("compression", 100, 1),
    "network (%)": ("network_compression", 100, 1),
    "parameters": ("network_parameters", 1, 0),
    "MACs": ("macs", 1, 0),
    "time (s)": ("seconds", 1, 1),
    "latency (ms)": ("latency_ms", 1, 3),
}
"""Name in the summary, factor and decimals by title; with 0 decimals only the mean is shown."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A text, and whether it is the best or the second best among the compressed groups."""

    text: str
    mark: Mark = ""


def table_titles(section: Section) -> list[str]:
    """Titles of the columns for which at least one run has a value.

    Accuracy and compression come first, so that a phone shows them.
    """
    known = [
        title
        for title, (name, *_) in COLUMNS.items()
        if any(group.values(name) for group in section.groups)
    ]
    return ["method", *known, "seeds"]


def table_rows(section: Section) -> list[list[Cell]]:
    """One row per group: means and standard deviations over the seeds."""
    rows, measured = [], section.measure.name
    for group, mark in zip(section.groups, _marks(section), strict=True):
        cells = [Cell(text=group.label)]
        for title in table_titles(section)[1:-1]:
            name, factor, digits = COLUMNS[title]
            values = group.values(name, factor)
            if values and not digits:
                values = [statistics.mean(values)]
            text = format_spread(values, digits)
            cells.append(Cell(text=text, mark=mark if name == measured else ""))
        rows.append([*cells, Cell(text=str(len(group.runs)))])
    return rows


def _marks(section: Section) -> list[Mark]:
    """Marks of the best values of the measure; equal printed values have equal marks."""
    measure = section.measure
    shown = [
        None if group.dense else round(group.mean(measure.name), measure.digits)
        for group in section.groups
    ]
    values = {value for value in shown if value is not None}
    best = sorted(values, reverse=measure.higher_is_better)
    marks: dict[float | None, Mark] = dict(zip(best, ("best", "second"), strict=False))
    return [marks.get(value, "") for value in shown]


def markdown_table(section: Section) -> str:
    """The table in GitHub's Markdown, with the best in bold and the second best underlined."""
    wrap = {"": "{}", "best": "**{}**", "second": "<ins>{}</ins>"}
    titles = table_titles(section)
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    lines += [
        [wrap[cell.mark].format(markdown(cell.text)) for cell in row] for row in table_rows(section)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex_table(section: Section) -> str:
    """The table in LaTeX, for the package booktabs."""
    wrap = {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"}
    titles = table_titles(section)
    rows = [[wrap[cell.mark].format(latex(cell.text)) for cell in r] for r in table_rows(section)]
    body = [" & ".join(row) + r" \\" for row in rows]
    dense = sum(group.dense for group in section.groups)
    if 0 < dense < len(body):
        body.insert(dense, r"\midrule")
    return "\n".join(
        [
            r"\begin{tabular}{l" + "r" * (len(titles) - 1) + "}",
            r"\toprule",
            " & ".join(map(latex, titles)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def provenance(summaries: Iterable[dict[str, Any]]) -> list[str]:
    """The distinct versions and machines of some results."""
    summaries, facts = list(summaries), []
    for name in ("versions", "machine"):
        found = [summary.get(name) for summary in summaries]
        for values in {json.dumps(value): value for value in found if value}.values():
            facts.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    return facts
