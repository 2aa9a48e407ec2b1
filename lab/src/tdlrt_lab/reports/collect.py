"""Reading of run directories, finished or not, with the reasons why any are left out."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdlrt.errors import RunError
from tdlrt_lab.run.environment import versions
from tdlrt_lab.run.metrics import EpochMetrics, is_finite_number
from tdlrt_lab.run.results import RunDirectory

__all__ = ["LOCATION", "Problem", "Run", "collect"]

LOCATION = ("data_dir", "device")
"""Options that say where a run reads and computes, and do not change what it computes."""

REQUIRED_NUMBERS = {
    "accuracy": (0.0, 100.0),
    "compression": (-math.inf, 1.0),
    "network_compression": (-math.inf, 1.0),
    "network_parameters": (0.0, math.inf),
    "seconds": (0.0, math.inf),
}
"""Numbers that a summary must hold, and their ranges."""

OPTIONAL_NUMBERS = ("tau", "budget", "macs")
OPTIONAL_TABLES = ("versions", "machine")
REPEATED_OPTIONS = ("model", "data", "method", "seed")
"""Options of the configuration that a summary repeats."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The reason why a run is left out of a report or should be read with care."""

    path: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        path: Path relative to the folder of the report.
        directory: The run directory.
        config: Options of the run.
        summary: Results of the run.
        history: Metrics of each epoch; empty if they cannot be read.
    """

    path: str
    directory: RunDirectory
    config: dict[str, Any]
    summary: dict[str, Any]
    history: list[EpochMetrics]

    def options_without(self, *names: str) -> str:
        """All options except these, as JSON: equal for runs with equal options."""
        kept = {name: value for name, value in self.config.items() if name not in names}
        return json.dumps(kept, sort_keys=True, default=str)


def collect(root: Path) -> tuple[list[Run], list[Problem]]:
    """Read all finished runs below a folder, and list the problems of these and other runs.

    Raises:
        RunError: The folder does not exist, or holds no run directories.
    """
    if not root.is_dir():
        raise RunError(f"{root}: no such folder; expected a folder with run directories")
    runs: list[Run] = []
    problems: list[Problem] = []
    for path in _run_paths(root):
        name = path.relative_to(root).as_posix()
        try:
            run = _read(path, name)
        except RunError as error:
            problems.append(Problem(path=name, text=f"left out: {error}"))
            continue
        runs.append(run)
        problems += [Problem(path=name, text=text) for text in _warnings(run)]
    if not runs and not problems:
        raise RunError(
            f"{root}: no run directories; expected the output of tdlrt train or tdlrt compare"
        )
    return _without_duplicates(runs, problems), problems


def _run_paths(root: Path) -> Iterator[Path]:
    """Directories that a run has written to, or for which a failure is recorded."""
    for folder, names, files in os.walk(root):
        names.sort()
        path = Path(folder)
        if path == root / "report":
            names.clear()
        elif {"config.yaml", "metrics.jsonl", "summary.json"} & set(files):
            yield path
        for file in sorted(files):
            run, ending, _ = file.partition(".error.json")
            if ending and not (path / run / "config.yaml").exists():
                yield path / run


def _read(path: Path, name: str) -> Run:
    directory = RunDirectory(path)
    if not directory.summary.exists():
        raise RunError(_why_unfinished(directory))
    config, summary = directory.read_config(), directory.read_summary()
    _check_summary(summary, config)
    try:
        history = directory.read_metrics()
    except (OSError, ValueError, TypeError):
        history = []
    return Run(path=name, directory=directory, config=config, summary=summary, history=history)


def _check_summary(summary: dict[str, Any], config: dict[str, Any]) -> None:
    """Check the values that a report shows, so that one damaged summary cannot break the report.

    Raises:
        RunError: A value is missing, has another type, is out of range, or contradicts config.yaml.
    """

    def wrong(key: str, expected: object) -> RunError:
        return RunError(f"summary.json: {key} is {summary[key]}; expected {expected}")

    for key in (*REQUIRED_NUMBERS, *REPEATED_OPTIONS):
        if key not in summary:
            raise RunError(f"summary.json: no {key}; written by another version?")
    for key, (low, high) in REQUIRED_NUMBERS.items():
        if not (is_finite_number(summary[key]) and low <= summary[key] <= high):
            raise wrong(key, f"a finite number from {low:g} to {high:g}")
    for key in OPTIONAL_NUMBERS:
        if not (summary.get(key) is None or is_finite_number(summary[key])):
            raise wrong(key, "a finite number")
    for key in OPTIONAL_TABLES:
        if not isinstance(summary.get(key, {}), dict):
            raise wrong(key, "a mapping from names to values")
    for key in REPEATED_OPTIONS:
        if key in config and summary[key] != config[key]:
            raise wrong(key, f"{config[key]}, as in config.yaml")


def _why_unfinished(directory: RunDirectory) -> str:
    failure = directory.path.with_suffix(".error.json")
    if failure.exists():
        try:
            return f"failed: {json.loads(failure.read_text(encoding='utf-8'))['error']}"
        except (OSError, ValueError, KeyError, TypeError):
            return f"failed; {failure.name} cannot be read"
    if not directory.config.exists():
        return "no config.yaml and no summary.json"
    epochs = directory.read_config().get("epochs")
    try:
        done = len(directory.metrics.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        done = 0
    return f"not finished: {done} of {epochs} epochs are stored"


def _warnings(run: Run) -> Iterator[str]:
    """Reasons to read the results of a finished run with care."""
    if not run.history:
        yield "metrics.jsonl cannot be read; the curves of this run are missing"
    for metrics in run.history:
        if not (is_finite_number(metrics.loss) and is_finite_number(metrics.accuracy)):
            yield f"epoch {metrics.epoch}: loss {metrics.loss}, accuracy {metrics.accuracy}"
    written, now = run.summary.get("versions", {}).get("tdlrt"), versions()["tdlrt"]
    if written != now:
        yield f"written by tdlrt {written}; this report by {now}"


def _without_duplicates(runs: Sequence[Run], problems: list[Problem]) -> list[Run]:
    """Keep one of several runs with the same options and seed, so that means count it once."""
    kept: dict[str, Run] = {}
    for run in runs:
        first = kept.setdefault(run.options_without(*LOCATION), run)
        if first is not run:
            text = f"left out: the same options and seed as {first.path}"
            problems.append(Problem(path=run.path, text=text))
    return list(kept.values())
