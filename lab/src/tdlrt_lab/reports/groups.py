"""Groups of runs with equal options, and sections of groups with the same network and data."""

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from tdlrt_lab.config import RunConfig
from tdlrt_lab.measures import BITS, Measure, measure_of
from tdlrt_lab.rank_option import format_rank
from tdlrt_lab.reports.collect import LOCATION, Run

__all__ = ["NOT_GROUPED_BY", "Group", "Section", "repetitions", "sections"]

SIZE_OPTIONS = ("tau", "budget", "rank")
"""Options that set the size of a network: groups that differ only in them share a line."""

MAX_NAME = 60
"""Letters of a section's name, to which the name of a figure is added."""

NOT_GROUPED_BY = ("seed", *LOCATION)
"""Options that do not distinguish groups."""

FIXED_DEFAULTS = {f.name: f.default for f in fields(RunConfig) if f.default not in (None, MISSING)}
"""Defaults that do not depend on other options."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        runs: The runs, sorted by seed.
        label_parts: The method, then the options that distinguish the group, by option name.
        sized_by: "tau" or "budget", if groups of the same method use both; else empty.
    """

    runs: list[Run]
    label_parts: dict[str, str]
    sized_by: str = ""

    @property
    def first(self) -> Run:
        """The run with the smallest seed."""
        return self.runs[0]

    @property
    def label(self) -> str:
        """The method and the options that distinguish the group."""
        return self.label_without()

    @property
    def series(self) -> str:
        """Label of the line in a figure that this group belongs to."""
        label = self.label_without(*SIZE_OPTIONS)
        return f"{label}, by {self.sized_by}" if self.sized_by else label

    @property
    def dense(self) -> bool:
        """Whether no run compresses its network."""
        return all(run.summary["compression"] == 0 for run in self.runs)

    def label_without(self, *options: str) -> str:
        """The label without some options."""
        return ", ".join(part for name, part in self.label_parts.items() if name not in options)

    def values(self, name: str, factor: float = 1.0) -> list[float]:
        """A number of the summary of each run that has it."""
        return [
            factor * run.summary[name] for run in self.runs if run.summary.get(name) is not None
        ]

    def mean(self, name: str) -> float:
        """Mean of a number over the runs."""
        return statistics.mean(self.values(name))

    def deviation(self, name: str) -> float:
        """Standard deviation of a number over the runs; 0 for a single run."""
        values = self.values(name)
        return statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Section:
    """All groups of a network and a data set: the dense ones first, each series by compression.

    Attributes:
        model: The network.
        data: The data set.
        groups: The groups.
        name: Name of the section in file names and on the page: letters, digits, ".", "_" and "-".
    """

    model: str
    data: str
    groups: list[Group]
    name: str = ""

    @property
    def title(self) -> str:
        """Heading of the section."""
        return f"{self.model} on {self.data}"

    @property
    def series(self) -> dict[str, list[Group]]:
        """The compressed groups of each line of a figure."""
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
    def measure(self) -> Measure:
        """How well the networks do: bits per character if all runs have them."""
        return measure_of(min(self._summaries, key=lambda one: measure_of(one) == BITS))

    @property
    def _summaries(self) -> list[dict[str, Any]]:
        return [run.summary for group in self.groups for run in group.runs]

    @property
    def setting(self) -> str:
        """Epochs, batch size, training images and validation split, where all groups share them."""
        first, *others = [group.first.config for group in self.groups]
        shared = {
            name: first.get(name)
            for name in ("epochs", "batch_size", "train_images")
            if all(other.get(name) == first.get(name) for other in others)
        }
        words = []
        if "epochs" in shared:
            words.append("1 epoch" if shared["epochs"] == 1 else f"{shared['epochs']} epochs")
        if "batch_size" in shared:
            words.append(f"batch {shared['batch_size']}")
        if isinstance(shared.get("train_images"), int):
            words.append(f"the first {shared['train_images']:,} training images")
        if any(summary.get("split") == "validation" for summary in self._summaries):
            words.append(f"{self.measure.words} on validation data held out from the training set")
        return ", ".join(words)


def sections(runs: Sequence[Run]) -> list[Section]:
    """Group runs by network and data set, and then by equal options."""
    by_setting: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        setting = str(run.summary["model"]), str(run.summary["data"])
        by_setting.setdefault(setting, []).append(run)
    names = _file_names(by_setting)
    return [
        Section(model=model, data=data, groups=_sort(_label(repetitions(found))), name=name)
        for name, ((model, data), found) in zip(names, sorted(by_setting.items()), strict=True)
    ]


def _file_names(settings: Iterable[tuple[str, str]]) -> list[str]:
    """A name for each network and data set, which no other has, by whatever names they go."""
    names: dict[str, str] = {}
    for model, data in sorted(settings):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{model}-{data}")[:MAX_NAME].strip(".-") or "runs"
        count = 1
        # On some file systems names that differ in their case are those of one file.
        while (unique := name if count == 1 else f"{name}-{count}").lower() in names:
            count += 1
        names[unique.lower()] = unique
    return list(names.values())


def repetitions(runs: Iterable[Run]) -> list[list[Run]]:
    """Lists of runs that differ only in their seed, each sorted by seed."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.summary["seed"]):
        groups.setdefault(run.options_without(*NOT_GROUPED_BY), []).append(run)
    return list(groups.values())


def _label(groups: list[list[Run]]) -> list[Group]:
    """Label groups by tolerance or budget and by the options that vary within their method."""
    labelled = []
    for runs in groups:
        config, summary = runs[0].config, runs[0].summary
        # Defaults depend on how the size is chosen, so options are compared among equals in that.
        same_method = [g[0] for g in groups if g[0].config["method"] == config["method"]]
        comparable = [run.config for run in same_method if _sized_by(run) == _sized_by(runs[0])]
        both_sizes = len(comparable) < len(same_method)
        parts = {"method": summary["method"]}
        for name in ("tau", "budget"):
            if summary.get(name) is not None:
                parts[name] = f"{name} {summary[name]:g}"
        for name, value in config.items():
            changed = both_sizes and FIXED_DEFAULTS.get(name, value) != value
            varies = changed or any(other.get(name) != value for other in comparable)
            if varies and name not in (*NOT_GROUPED_BY, *parts):
                parts[name] = f"{name.replace('_', ' ')} {_format(value)}"
        sized_by = _sized_by(runs[0]) if both_sizes else ""
        labelled.append(Group(runs=runs, label_parts=parts, sized_by=sized_by))
    return labelled


def _sized_by(run: Run) -> str:
    """The option that sets the size of the network."""
    return "budget" if run.config.get("budget") is not None else "tau"


def _format(value: Any) -> str:
    return format_rank(value) if isinstance(value, dict) else str(value)


def _sort(groups: list[Group]) -> list[Group]:
    return sorted(groups, key=lambda g: (not g.dense, g.series, g.mean("compression"), g.label))
