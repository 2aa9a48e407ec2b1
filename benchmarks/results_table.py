"""Write docs/results.md, and the table in the README, from the result files in benchmarks/results.

python benchmarks/results_table.py
"""

import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from comparisons import EXPERIMENTS, ROOT, Result, as_runs, recorded
from findings import findings, markdown
from readme_table import readme_table
from tdlrt.errors import TdlrtError
from tdlrt_lab.config import RunConfig
from tdlrt_lab.documents import fill_section
from tdlrt_lab.methods import METHODS
from tdlrt_lab.rank_option import format_rank
from tdlrt_lab.reports.groups import NOT_GROUPED_BY, Group, Section, repetitions
from tdlrt_lab.reports.tables import provenance, table_rows, table_titles
from tdlrt_lab.sweep.plan import Sweep, read_sweep

NUMBERS = 5
"""Columns of the lab's table behind the method: all but the times, of which others had a share."""

INTRODUCTION = """\
# Results

How accurate are networks trained by TDLRT, at which size, beside dense ones and other methods? This
page gives the comparisons first and then every group of runs.

Written by `python benchmarks/results_table.py` from the result files in `benchmarks/results`; do
not edit. Numbers are means over the seeds, ± one standard deviation between them. Accuracy is
that on the test set after the last epoch. *Compression* is the share of parameters saved, over the
weights of the factorised layers and over the whole network; *MACs* are multiply-adds for one image.
Of text, *bits per character* is the mean cross-entropy on held-out files: lower is better.
The method *dense* trains the network as it is, *tdlrt* finds the ranks for a tolerance or a budget,
and *tucker* trains cores and bases as free parameters at ranks set by hand. Options that are not
named have the defaults of the command line. Words are explained in the [glossary](glossary.md).
"""


def main() -> None:
    try:
        sweeps = {name: read_sweep(path) for name, path in EXPERIMENTS.items()}
        results = {name: found for name in sweeps if (found := recorded(name))}
    except TdlrtError as error:
        sys.exit(f"error: {error}")
    target = ROOT / "docs" / "results.md"
    sections = [section(name, sweeps[name], group) for name, group in results.items()]
    target.write_text("\n".join([INTRODUCTION, findings(results), *sections]), encoding="utf-8")
    print(f"wrote {target.relative_to(ROOT)}")
    fill_section(ROOT / "README.md", "results", readme_table(results).splitlines())


def section(name: str, sweep: Sweep, results: Sequence[Result]) -> str:
    """The table of one experiment, with how its numbers came about."""
    found = compared(sweep, results)
    titles = ["method", "seeds", *table_titles(found)[1 : 1 + NUMBERS]]
    rows = [[group.label, seed_list(group), *cells] for group, cells in numbers(found)]
    lines = [
        f"## {sweep.title}",
        "",
        f"{setting(sweep)}. `python benchmarks/accuracy.py --only {name}`",
        "",
        *textwrap.wrap(sweep.note, 100),
        "",
        markdown(titles, rows),
        "",
        "Commands, for the first seed of each row:",
        "",
        "```sh",
        *(group.first.summary["command"] for group in found.groups),
        "```",
        "",
        *(f"- {fact}" for fact in provenance(results)),
        "",
    ]
    return "\n".join(lines)


def numbers(found: Section) -> Iterator[tuple[Group, list[str]]]:
    """Each row of the table, and its numbers as the lab's reports write them."""
    for group, cells in zip(found.groups, table_rows(found), strict=True):
        yield group, [cell.text for cell in cells[1 : 1 + NUMBERS]]


def setting(sweep: Sweep) -> str:
    """What all rows share."""
    config = RunConfig(**sweep.options)
    words = [f"{config.epochs} epoch{'s' * (config.epochs > 1)}", f"batch {config.batch_size}"]
    if config.train_images is not None:
        words.append(f"the first {config.train_images:,} training images")
    shown = ("model", "data", "epochs", "batch_size", "train_images")
    words += [f"{name} {value}" for name, value in sweep.options.items() if name not in shown]
    return ", ".join(words)


def compared(sweep: Sweep, results: Sequence[Result]) -> Section:
    """The groups of an experiment.

    Methods in the order of the command line with dense first, each by compression.
    """
    rows = [run.config for run in sweep.runs(".")]
    groups = [
        Group(runs=runs, label_parts={"": label(sweep, rows, runs[0].config)})
        for runs in repetitions(as_runs(results))
    ]

    def place(group: Group) -> tuple[bool, int, float, str]:
        method = group.first.config["method"]
        order = list(METHODS).index(method)
        return method != "dense", order, group.mean("compression"), group.label

    options = sweep.options
    return Section(model=options["model"], data=options["data"], groups=sorted(groups, key=place))


def label(sweep: Sweep, rows: Sequence[RunConfig], config: dict[str, Any]) -> str:
    """Method, tolerance or budget, and every option that the experiment does not share.

    Of the learning rate also the default, which hangs on the method, where others were tried.
    """
    method, budget = config["method"], config["budget"]
    chosen = {"method": method, "optimizer": config["optimizer"], "tau": None, "budget": budget}
    default = RunConfig(**{**sweep.options, **chosen}).to_dict()
    words = [method]
    options = METHODS[method].options
    if budget is not None and "budget" in options:
        words.append(f"budget {budget:g}")
    elif "tau" in options:
        words.append(f"tau {config['tau']:g}")
    default["optimizer"] = RunConfig(**sweep.options).optimizer
    recipe = method, config["optimizer"]
    if len({row.lr for row in rows if (row.method, row.optimizer) == recipe}) > 1:
        default["lr"] = None
    for name, value in default.items():
        if name not in (*NOT_GROUPED_BY, "tau", "budget", "method") and config[name] != value:
            words.append(f"{name} {_text(config[name])}")
    return ", ".join(words)


def _text(value: Any) -> str:
    return f"`{format_rank(value)}`" if isinstance(value, dict) else str(value)


def seed_list(group: Group) -> str:
    """Seeds as a list, or as a range where there are many in a row."""
    seeds = [run.summary["seed"] for run in group.runs]
    if len(seeds) > 3 and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


if __name__ == "__main__":
    main()
