"""Reading of run directories, finished or not, with the reasons why any are left out."""

import itertools
import json
import os
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdlrt.errors import RunError
from tdlrt.files import read_text
from tdlrt_lab.measures import measure_of
from tdlrt_lab.reports.escaping import shorten
from tdlrt_lab.reports.values import plain_value, printable
from tdlrt_lab.run.environment import versions
from tdlrt_lab.run.files import read_object
from tdlrt_lab.run.metrics import EpochMetrics, is_finite_number
from tdlrt_lab.run.results import MAX_METRICS, RunDirectory

__all__ = ["LOCATION", "Problem", "Run", "collect", "problem"]

LOCATION = ("data_dir", "device")
"""Options that say where a run reads and computes, and do not change what it computes."""

COMPARED = {
    "training": ("data", "image_size", "train_images"),
    "test": ("data", "image_size"),
}
"""Options that decide, with the data set's files, which images a part of the data has."""

FAILURE = ".error.json"
"""Ending of the file beside a run directory that says why the run failed."""

NAMES = ("model", "data", "method")
REPEATED_OPTIONS = (*NAMES, "seed")
"""Options of the configuration that a summary repeats."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The reason why a run is left out of a report or should be read with care."""

    path: str
    text: str


MAX_LETTERS = 500
"""Letters of the text of a problem."""


def problem(path: str, reason: object) -> Problem:
    """A problem in printable letters, whatever the files contain that it speaks of."""
    return Problem(path=printable(path), text=shorten(printable(str(reason)), MAX_LETTERS))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        path: Path relative to the folder of the report.
        directory: The run directory.
        config: Options of the run.
        summary: Results of the run.
        history: Metrics of each epoch; empty if they cannot be read.
        unread: Why the metrics cannot be read; else empty.
    """

    path: str
    directory: RunDirectory
    config: dict[str, Any]
    summary: dict[str, Any]
    history: list[EpochMetrics]
    unread: str = ""

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
            problems.append(problem(name, f"left out: {error}"))
            continue
        except Exception as error:  # no damage to one run may end the report of the others
            problems.append(problem(name, f"left out: {type(error).__name__}: {error}"))
            continue
        runs.append(run)
        problems += [problem(name, text) for text in _warnings(run)]
    if not runs and not problems:
        raise RunError(
            f"{root}: no run directories; expected the output of tdlrt train or tdlrt compare"
        )
    kept = _without_duplicates(runs, problems)
    return kept, [*problems, *_other_images(kept)]


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
            if run not in ("", file) and not os.path.exists(path / run / "config.yaml"):
                yield path / run


def _read(path: Path, name: str) -> Run:
    directory = RunDirectory(path)
    if not directory.summary.exists():
        raise RunError(_why_unfinished(directory))
    config = _plain(directory.read_config(), "config.yaml")
    summary = _plain(directory.read_summary(), "summary.json")
    _check_options(summary, config)
    history, unread = _read_history(directory)
    return Run(
        path=printable(name),
        directory=directory,
        config=config,
        summary=summary,
        history=history,
        unread=unread,
    )


def _plain(values: dict[str, Any], place: str) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = plain_value(values)
    except RunError as error:
        raise RunError(f"{place}: {error}; expected what a run writes") from error
    return plain


def _read_history(directory: RunDirectory) -> tuple[list[EpochMetrics], str]:
    """The metrics of a run, or none and the reason why they cannot be read."""
    try:
        history = [
            EpochMetrics(**plain_value(vars(metrics))) for metrics in directory.read_metrics()
        ]
        lengths: dict[str, int] = {}
        for metrics in history:
            each = [metrics.ranks, *(changed for _, changed in metrics.rank_changes)]
            for layer, ranks in itertools.chain.from_iterable(part.items() for part in each):
                if lengths.setdefault(layer, len(ranks)) != len(ranks):
                    raise RunError(f"epoch {metrics.epoch}: {layer} has ranks of another number")
    except (OSError, ValueError, TypeError, RunError) as error:
        return [], str(error)
    return history, ""


def _check_options(summary: dict[str, Any], config: dict[str, Any]) -> None:
    """Check that a summary belongs to the options beside it.

    Raises:
        RunError: It contradicts config.yaml, or has a name that cannot be shown.
    """

    def wrong(key: str, expected: str) -> RunError:
        return RunError(f"summary.json: {key} is {reprlib.repr(summary[key])}; expected {expected}")

    for key in REPEATED_OPTIONS:
        if key in config and summary[key] != config[key]:
            raise wrong(key, f"{reprlib.repr(config[key])}, as in config.yaml")
    for key in NAMES:  # matplotlib hides labels that begin with an underscore
        if not summary[key][:1].isalnum():
            raise wrong(key, "a name that begins with a letter or a digit")


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
        reason = f" ({run.unread})" if run.unread else ""
        yield f"metrics.jsonl cannot be read{reason}; the curves of this run are missing"
    measure = measure_of(run.summary)
    for metrics in run.history:
        quality = getattr(metrics, measure.name)
        if not (is_finite_number(metrics.loss) and is_finite_number(quality)):
            yield f"epoch {metrics.epoch}: loss {metrics.loss}, {measure.words} {quality}"
    written, now = run.summary.get("versions", {}).get("tdlrt"), versions()["tdlrt"]
    if written != now:
        yield f"written by tdlrt {written}; this report by {now}"


def _without_duplicates(runs: Sequence[Run], problems: list[Problem]) -> list[Run]:
    """Keep one of several runs with the same options and seed, so that means count it once."""
    kept: dict[str, Run] = {}
    for run in runs:
        images = json.dumps(run.summary.get("images"), sort_keys=True, default=str)
        first = kept.setdefault(run.options_without(*LOCATION) + images, run)
        if first is not run:
            text = f"left out: the same options and seed as {first.path}"
            problems.append(problem(run.path, text))
    return list(kept.values())


def _other_images(runs: Sequence[Run]) -> Iterator[Problem]:
    """Runs on a data set of the same name as another run's, but with other images or labels."""
    for part, options in COMPARED.items():
        firsts: dict[str, Run] = {}
        for run in runs:
            if (images := _images(run, part)) is None:
                continue
            key = json.dumps([run.config.get(name) for name in options], default=str)
            first = firsts.setdefault(key, run)
            if images != _images(first, part):
                text = f"other {part} images than {first.path}; do not compare the two"
                yield problem(run.path, text)


def _images(run: Run, part: str) -> Any:
    """What the summary says of a part of the data; earlier versions say nothing."""
    images = run.summary.get("images")
    return images.get(part) if isinstance(images, dict) else None
