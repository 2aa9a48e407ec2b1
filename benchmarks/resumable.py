"""Measurements that are stored one after the other and continue where they were stopped."""

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.files import write_text

__all__ = ["accuracy_at_the_end", "combinations", "measured"]

Row = dict[str, Any]


def combinations(**values: Iterable[Any]) -> list[Row]:
    """A run for each combination of values; the last ones change fastest."""
    return [dict(zip(values, run, strict=True)) for run in product(*values.values())]


def measured(
    result: Path, command: str, runs: Iterable[Row], measure: Callable[..., Mapping[str, Any]]
) -> Row:
    """The content of a result file once it has a row for every run.

    Args:
        result: The file. Runs that have a row there are not measured again, and each new row is
            stored at once.
        command: The command that measures them.
        runs: For each run the facts that tell it from the others.
        measure: Called with these facts as keyword arguments; returns what to add to them.
    """
    stored: Row = json.loads(result.read_text("utf-8")) if result.exists() else {"rows": []}
    rows = stored["rows"]
    for run in runs:
        if any(run.items() <= row.items() for row in rows):
            continue
        rows.append({**run, **measure(**run)})
        print(rows[-1], flush=True)
        stored = {**made_by(command), "rows": rows}
        write_text(result, json.dumps(stored, indent=1) + "\n")
    return stored


def accuracy_at_the_end(rows: Iterable[Row], **wanted: Any) -> str:
    """Mean of the last accuracies of the rows with these facts, or nothing if there are none."""
    last = [row["accuracies"][-1] for row in rows if wanted.items() <= row.items()]
    return f"{mean(last):.1f}" if last else ""
