"""The results of an experiment in one file: a line per run, which outlives the run directories."""

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from tdlrt.errors import RunError
from tdlrt_lab.run.files import parse_object, write_text

__all__ = ["read_results", "record"]


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The recorded results of an experiment, in the order of rows and seeds; none without a file.

    Raises:
        RunError: The file cannot be read, or a line of it is broken.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); expected JSON lines") from error
    results = [parse_object(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1)]
    for number, result in enumerate(results, start=1):
        if not (isinstance(result.get("row"), str) and isinstance(result.get("seed"), int)):
            raise RunError(f"{path}, line {number}: expected the name of a row and a seed")
    return results


def record(path: str | Path, row: str, summary: dict[str, Any]) -> None:
    """Store the summary of a run as the result of its row and seed, in place of an earlier one.

    Processes that record at the same time wait for each other, and the file is whole at any moment.

    Args:
        path: The file of the experiment; a file beside it, PATH.lock, is its lock.
        row: Name of the row that the run belongs to.
        summary: What `run` returned.

    Raises:
        RunError: The file cannot be read or written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        results = {(result["row"], result["seed"]): result for result in read_results(path)}
        results[row, summary["seed"]] = {"row": row, **summary}
        write_text(path, "".join(f"{json.dumps(results[key])}\n" for key in sorted(results)))
