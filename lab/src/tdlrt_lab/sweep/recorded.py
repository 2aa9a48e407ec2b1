"""The results of an experiment in one file, one line per run, without the run directories."""

import json
import os
from pathlib import Path
from typing import Any

from tdlrt.errors import RunError
from tdlrt.files import read_text
from tdlrt_lab.run.files import parse_object, write_text
from tdlrt_lab.run.locks import lock_file

__all__ = ["read_results", "record"]

MAX_BYTES = 2**26


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The recorded results of an experiment, sorted by row and seed; empty if there is no file.

    Raises:
        RunError: The file cannot be read, or a line is not valid.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return []
    try:
        lines = read_text(path, max_bytes=MAX_BYTES).splitlines()
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); expected JSON lines") from error
    results = []
    for number, line in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        result = parse_object(line, place, "result of a finished run")
        if not (isinstance(result.get("row"), str) and isinstance(result.get("seed"), int)):
            raise RunError(f"{place}: expected the name of a row and a seed")
        results.append(result)
    return results


def record(path: str | Path, row: str, summary: dict[str, Any]) -> None:
    """Store the summary of a run as the result of its row and seed, replacing an earlier one.

    The file is written atomically, and processes that record at the same time wait for each other.

    Args:
        path: The file of the experiment; PATH.lock is its lock file.
        row: Name of the row of the run.
        summary: The summary that `run` returned.

    Raises:
        RunError: The file cannot be read or written.
    """
    path = Path(path)
    with lock_file(path.with_name(f"{path.name}.lock")):
        results = {(result["row"], result["seed"]): result for result in read_results(path)}
        results[row, summary["seed"]] = {"row": row, **summary}
        write_text(path, "".join(f"{json.dumps(results[key])}\n" for key in sorted(results)))
