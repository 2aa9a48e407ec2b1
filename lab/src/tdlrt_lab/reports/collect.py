"""Reading run directories, whatever state they are in, and putting them in groups."""

import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from tdlrt.errors import RunError
from tdlrt_lab.config import RunConfig
from tdlrt_lab.rank_option import format_rank
from tdlrt_lab.run.environment import versions
from tdlrt_lab.run.metrics import EpochMetrics, is_finite_number
from tdlrt_lab.run.results import RunDirectory

__all__ = [
    "PLACE",
    "SIZES",
    "Group",
    "Problem",
    "Run",
    "Section",
    "collect",
    "repetitions",
    "sections",
]

SIZES = ("tau", "budget", "rank")
"""Options that say how small a network becomes: groups that differ in them alone are one line."""

PLACE = ("seed", "data_dir", "device")
"""Options that do not tell one group from another."""

NUMBERS = {
    "accuracy": (0.0, 100.0),
    "compression": (-math.inf, 1.0),
    "network_compression": (-math.inf, 1.0),
    "network_parameters": (0.0, math.inf),
    "seconds": (0.0, math.inf),
}
"""What a summary must hold, and its range."""

MAYBE_NUMBERS = ("tau", "budget", "macs")
MAYBE_TABLES = ("versions", "machine")
SHARED = ("model", "data", "method", "seed")
"""Options that a summary repeats."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something about a run that a reader must know: why it is left out, or what is odd."""

    path: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        path: Where it is, from the folder of the report.
        directory: Its files.
        config: Its options.
        summary: Its result.
        history: Its epochs; empty if they cannot be read.
    """

    path: str
    directory: RunDirectory
    config: dict[str, Any]
    summary: dict[str, Any]
    history: list[EpochMetrics]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        runs: By seed.
        words: The method, then what tells this group from others, option by option.
        sized_by: How this group's size is chosen, if its method has several ways here.
    """

    runs: list[Run]
    words: dict[str, str]
    sized_by: str = ""

    @property
    def first(self) -> Run:
        """The run with the smallest seed."""
        return self.runs[0]

    @property
    def label(self) -> str:
        """Method and options."""
        return self.label_without()

    @property
    def series(self) -> str:
        """What groups of one line in a picture have in common."""
        return self.label_without(*SIZES) + (f", by {self.sized_by}" if self.sized_by else "")

    @property
    def dense(self) -> bool:
        """Whether nothing is saved: a reference for the others."""
        return all(run.summary["compression"] == 0 for run in self.runs)

    def label_without(self, *options: str) -> str:
        """The label, less some options."""
        return ", ".join(text for name, text in self.words.items() if name not in options)

    def values(self, name: str, factor: float = 1.0) -> list[float]:
        """A number of each run's summary."""
        return [
            factor * run.summary[name] for run in self.runs if run.summary.get(name) is not None
        ]

    def mean(self, name: str) -> float:
        """Mean of a number over the runs."""
        return statistics.mean(self.values(name))

    def deviation(self, name: str) -> float:
        """Standard deviation of a number between the runs; 0 of a single one."""
        values = self.values(name)
        return statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Section:
    """All groups of a network on a data set, the dense ones first, each line by compression."""

    model: str
    data: str
    groups: list[Group]

    @property
    def name(self) -> str:
        """For file names."""
        return f"{self.model}-{self.data}".replace("/", "-")

    @property
    def title(self) -> str:
        """For readers."""
        return f"{self.model} on {self.data}"

    @property
    def series(self) -> dict[str, list[Group]]:
        """Compressed groups by the line that they belong to."""
        lines: dict[str, list[Group]] = {}
        for group in self.groups:
            if not group.dense:
                lines.setdefault(group.series, []).append(group)
        return lines

    @property
    def references(self) -> list[Group]:
        """The dense groups."""
        return [group for group in self.groups if group.dense]

    @property
    def setting(self) -> str:
        """What all runs share, in words."""
        first, *others = [group.first.config for group in self.groups]
        words = []

        def shared(name: str) -> bool:
            return all(other.get(name) == first.get(name) for other in others)

        for name, text in (("epochs", "{} epochs"), ("batch_size", "batch {}")):
            words += [text.format(first.get(name))] if shared(name) else []
        images = first.get("train_images")
        if isinstance(images, int) and shared("train_images"):
            words.append(f"the first {images:,} training images")
        if any(run.summary.get("split") == "validation" for g in self.groups for run in g.runs):
            words.append("accuracy on validation images held out from the training set")
        return ", ".join(words)


def collect(root: Path) -> tuple[list[Run], list[Problem]]:
    """All finished runs below a folder, and everything that keeps a run out or makes it doubtful.

    Raises:
        RunError: There is no such folder, or nothing of a run in it.
    """
    if not root.is_dir():
        raise RunError(f"{root}: no such folder; expected the directory of a sweep or of runs")
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
        problems += [Problem(path=name, text=text) for text in _oddities(run)]
    if not runs and not problems:
        raise RunError(
            f"{root}: holds no run directories; expected what tdlrt compare or tdlrt train writes"
        )
    return _without_copies(runs, problems), problems


def _run_paths(root: Path) -> Iterator[Path]:
    """Directories that a run wrote to or that a failure is recorded for."""
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
    """Refuse what no run writes: it would end up in a table, or break the report of all the others.

    Raises:
        RunError: Something is missing, of another type, out of its range, or not as configured.
    """

    def wrong(key: str, expected: object) -> RunError:
        return RunError(f"summary.json: {key} is {summary[key]}; expected {expected}")

    for key in (*NUMBERS, *SHARED):
        if key not in summary:
            raise RunError(f"summary.json: no {key}; written by another version?")
    for key, (low, high) in NUMBERS.items():
        if not (is_finite_number(summary[key]) and low <= summary[key] <= high):
            raise wrong(key, f"a finite number from {low:g} to {high:g}")
    for key in MAYBE_NUMBERS:
        if not (summary.get(key) is None or is_finite_number(summary[key])):
            raise wrong(key, "a finite number")
    for key in MAYBE_TABLES:
        if not isinstance(summary.get(key, {}), dict):
            raise wrong(key, "names with values")
    for key in SHARED:
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


def _oddities(run: Run) -> Iterator[str]:
    """What makes a finished run doubtful."""
    if not run.history:
        yield "metrics.jsonl cannot be read: no curves of this run"
    for metrics in run.history:
        if not (is_finite_number(metrics.loss) and is_finite_number(metrics.accuracy)):
            yield f"epoch {metrics.epoch}: loss {metrics.loss}, accuracy {metrics.accuracy}"
    made, now = run.summary.get("versions", {}).get("tdlrt"), versions()["tdlrt"]
    if made != now:
        yield f"made by tdlrt {made}; this report by {now}"


def _without_copies(runs: Sequence[Run], problems: list[Problem]) -> list[Run]:
    """Runs with the same options and seed once: the others would count twice in every mean."""
    kept: dict[str, Run] = {}
    for run in runs:
        first = kept.setdefault(_key(run, but=("data_dir", "device")), run)
        if first is not run:
            text = f"left out: the same options and seed as {first.path}"
            problems.append(Problem(path=run.path, text=text))
    return list(kept.values())


def _key(run: Run, but: Iterable[str]) -> str:
    kept = {name: value for name, value in run.config.items() if name not in but}
    return json.dumps(kept, sort_keys=True, default=str)


def sections(runs: Sequence[Run]) -> list[Section]:
    """Runs by network and data set, in groups of equal options."""
    by_place: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        place = str(run.summary["model"]), str(run.summary["data"])
        by_place.setdefault(place, []).append(run)
    return [
        Section(model=model, data=data, groups=_sorted(_labelled(repetitions(found))))
        for (model, data), found in sorted(by_place.items())
    ]


def repetitions(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that differ in their seed alone, in the order of their seeds."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.summary["seed"]):
        groups.setdefault(_key(run, PLACE), []).append(run)
    return list(groups.values())


def _labelled(groups: list[list[Run]]) -> list[Group]:
    """Name tolerance or budget, and options that differ between groups of the same recipe."""
    labelled = []
    for runs in groups:
        config, summary = runs[0].config, runs[0].summary
        peers = [g[0] for g in groups if g[0].config["method"] == config["method"]]
        same = [peer.config for peer in peers if _sized_by(peer) == _sized_by(runs[0])]
        words = {"method": summary["method"]}
        for name in ("tau", "budget"):
            if summary.get(name) is not None:
                words[name] = f"{name} {summary[name]:g}"
        for name, value in config.items():
            odd = _FIXED.get(name, value) != value and len(peers) > len(same)
            varies = odd or any(other.get(name) != value for other in same)
            if varies and name not in (*PLACE, *words):
                words[name] = f"{name.replace('_', ' ')} {_text(value)}"
        several = len({_sized_by(peer) for peer in peers}) > 1
        sized_by = _sized_by(runs[0]) if several else ""
        labelled.append(Group(runs=runs, words=words, sized_by=sized_by))
    return labelled


_FIXED = {f.name: f.default for f in fields(RunConfig) if f.default not in (None, MISSING)}
"""Options whose default is the same for every recipe."""


def _sized_by(run: Run) -> str:
    """What says how small the network becomes; the defaults of many options depend on it."""
    return "budget" if run.config.get("budget") is not None else "tau"


def _text(value: Any) -> str:
    return format_rank(value) if isinstance(value, dict) else str(value)


def _sorted(groups: list[Group]) -> list[Group]:
    return sorted(groups, key=lambda g: (not g.dense, g.series, g.mean("compression"), g.label))
