"""Reading of run directories, finished or not, with the reasons why any are left out."""

import json
import os
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdlrt.errors import RunError
from tdlrt.files import read_text
from tdlrt_lab.run.environment import versions
from tdlrt_lab.run.files import read_object
from tdlrt_lab.run.metrics import EpochMetrics, is_finite_number
from tdlrt_lab.run.results import MAX_METRICS, RunDirectory

__all__ = ["LOCATION", "Problem", "Run", "collect"]

LOCATION = ("data_dir", "device")
"""Options that say where a run reads and computes, and do not change what it computes."""

FAILURE = ".error.json"
"""Ending of the file beside a run directory that says why the run failed."""

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
            run = file.removesuffix(FAILURE)
            if run not in ("", file) and not (path / run / "config.yaml").exists():
                yield path / run


def _read(path: Path, name: str) -> Run:
    directory = RunDirectory(path)
    if not directory.summary.exists():
        raise RunError(_why_unfinished(directory))
    config, summary = directory.read_config(), directory.read_summary()
    _check_options(summary, config)
    try:
        history = directory.read_metrics()
    except (OSError, ValueError):
        history = []
    return Run(path=name, directory=directory, config=config, summary=summary, history=history)


def _check_options(summary: dict[str, Any], config: dict[str, Any]) -> None:
    """Check that a summary belongs to the options beside it.

    Raises:
        RunError: It contradicts config.yaml.
    """
    for key in REPEATED_OPTIONS:
        if key in config and summary[key] != config[key]:
            raise RunError(
                f"summary.json: {key} is {reprlib.repr(summary[key])}; expected "
                f"{reprlib.repr(config[key])}, as in config.yaml"
            )


def _why_unfinished(directory: RunDirectory) -> str:
    failure = directory.path.with_suffix(FAILURE)
    if failure.exists():
        try:
            return f"failed: {read_object(failure, 'record of a failure')['error']}"
        except (RunError, KeyError):
            return f"failed; {failure.name} cannot be read"
    if not directory.config.exists():
        return "no config.yaml and no summary.json"
    epochs = directory.read_config().get("epochs")
    try:
        done = len(read_text(directory.metrics, max_bytes=MAX_METRICS).splitlines())
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
