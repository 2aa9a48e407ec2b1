"""Write docs/results.md, and the table in the README, from the result files in benchmarks/results.

python benchmarks/results_table.py
"""

import json
import statistics
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparisons import (
    EXPERIMENTS,
    PLACE,
    RESULTS,
    Experiment,
    Result,
    repetitions,
    stored_options,
)
from findings import findings
from tdlrt.errors import TdlrtError
from tdlrt_lab.config import RunConfig
from tdlrt_lab.methods import METHODS
from tdlrt_lab.rank_option import format_rank
from tdlrt_lab.run.results import read_results
from tdlrt_lab.spread import format_spread

ROOT = Path(__file__).parent.parent

BEGIN, END = "<!-- results -->", "<!-- end of results -->"

INTRODUCTION = """\
# Results

Written by `python benchmarks/results_table.py` from the result files in `benchmarks/results`; do
not edit. Numbers are means over the seeds, ± one standard deviation between them. Accuracy is
that on the test set after the last epoch. *Compression* is the share of parameters saved, over the
weights of the factorised layers and over the whole network; *MACs* are multiply-adds for one image.
The method *dense* trains the network as it is, *tdlrt* finds the ranks for a tolerance or a budget,
and *tucker* trains cores and bases as free parameters at ranks set by hand. Options that are not
named have the defaults of the command line. Words are explained in the [glossary](glossary.md).
"""


def main() -> None:
    names = [name for name in EXPERIMENTS if (RESULTS / name).is_dir()]
    try:
        results = {name: read_results(RESULTS / name) for name in names}
    except TdlrtError as error:
        sys.exit(f"error: {error}")
    target = ROOT / "docs" / "results.md"
    sections = [section(name, EXPERIMENTS[name], group) for name, group in results.items()]
    text = "\n".join([INTRODUCTION, findings(results), *sections])
    target.write_text(text, encoding="utf-8")
    print(f"wrote {target.relative_to(ROOT)}")
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    shown = [name for name in names if EXPERIMENTS[name].in_readme]
    tables = "\n\n".join(short_table(EXPERIMENTS[name], results[name]) for name in shown)
    readme.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}", encoding="utf-8")


def section(name: str, experiment: Experiment, results: list[Result]) -> str:
    """The table of one experiment, with how its numbers came about."""
    lines = [
        f"## {title(experiment)}: {experiment.subject}",
        "",
        f"{setting(experiment)}. `python benchmarks/accuracy.py --only {name}`",
        "",
        *textwrap.wrap(experiment.note, 100),
        "",
        "| method | seeds | accuracy (%) | compression (%) | network (%) | parameters | MACs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups = grouped(experiment, results)
    lines += [row(label, group) for label, group in groups]
    lines += ["", "Commands, for the first seed of each row:", "", "```sh"]
    lines += [group[0]["command"] for _, group in groups]
    lines += ["```", "", *(f"- {fact}" for fact in provenance(results)), ""]
    return "\n".join(lines)


def short_table(experiment: Experiment, results: list[Result]) -> str:
    """Accuracy and compression alone, for the README."""
    lines = [
        f"{title(experiment)}, {setting(experiment)}, mean over the seeds ± standard deviation:",
        "",
        "| method | seeds | accuracy (%) | compression of the factorised layers (%) |",
        "| --- | --- | --- | --- |",
    ]
    for label, group in grouped(experiment, results):
        name, _, *numbers = cells(label, group)
        lines.append(f"| {' | '.join([name, str(len(group)), *numbers[:2]])} |")
    return "\n".join(lines)


def title(experiment: Experiment) -> str:
    """Network and data."""
    return f"{experiment.options['model']} on {experiment.options['data']}"


def setting(experiment: Experiment) -> str:
    """What all rows share."""
    config = RunConfig(**experiment.options)
    words = [f"{config.epochs} epochs", f"batch {config.batch_size}"]
    if config.train_images is not None:
        words.append(f"the first {config.train_images:,} training images")
    shown = ("model", "data", "epochs", "batch_size", "train_images")
    words += [f"{name} {value}" for name, value in experiment.options.items() if name not in shown]
    return ", ".join(words)


def grouped(experiment: Experiment, results: list[Result]) -> list[tuple[str, list[Result]]]:
    """Runs that differ in their seed alone, under what they have in common.

    Methods in the order of the command line with dense first, each by compression.
    """
    groups = [
        (label(experiment, stored_options(group[0])), group) for group in repetitions(results)
    ]

    def place(item: tuple[str, list[Result]]) -> tuple[bool, int, float, str]:
        label, group = item
        method = group[0]["method"]
        size = statistics.mean(result["compression"] for result in group)
        return method != "dense", list(METHODS).index(method), size, label

    return sorted(groups, key=place)


def label(experiment: Experiment, config: dict[str, Any]) -> str:
    """Method, tolerance or budget, and every option that the experiment does not share.

    Of the learning rate also the default, which hangs on the method, where others were tried.
    """
    method, budget = config["method"], config["budget"]
    chosen = {"method": method, "optimizer": config["optimizer"], "tau": None, "budget": budget}
    default = RunConfig(**{**experiment.options, **chosen}).to_dict()
    words = [method]
    options = METHODS[method].options
    if budget is not None and "budget" in options:
        words.append(f"budget {budget:g}")
    elif "tau" in options:
        words.append(f"tau {config['tau']:g}")
    default["optimizer"] = RunConfig(**experiment.options).optimizer
    recipe = method, config["optimizer"]
    rows = [experiment.config(row, 0) for row in experiment.rows]
    if len({row.lr for row in rows if (row.method, row.optimizer) == recipe}) > 1:
        default["lr"] = None
    for name, value in default.items():
        if name not in (*PLACE, "tau", "budget", "method") and config[name] != value:
            words.append(f"{name} {_text(config[name])}")
    return ", ".join(words)


def _text(value: Any) -> str:
    return f"`{format_rank(value)}`" if isinstance(value, dict) else str(value)


def seed_list(seeds: Sequence[int]) -> str:
    """Seeds as a list, or as a range where there are many in a row."""
    if len(seeds) > 3 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def row(label: str, group: list[Result]) -> str:
    """One line of the table."""
    return f"| {' | '.join(cells(label, group))} |"


def cells(label: str, group: list[Result]) -> list[str]:
    """Method, seeds, accuracy, compressions, parameters, multiply-adds."""
    seeds = seed_list([result["seed"] for result in group])
    texts = [label, seeds, format_spread([result["accuracy"] for result in group], 2)]
    for name in ("compression", "network_compression"):
        texts.append(format_spread([100 * result[name] for result in group], 1))
    for name in ("network_parameters", "macs"):
        texts.append(f"{statistics.mean(result[name] for result in group):,.0f}")
    return texts


def provenance(results: list[Result]) -> list[str]:
    """Versions and machines, each distinct combination once."""
    facts = []
    for name in ("versions", "machine"):
        distinct = {json.dumps(result[name]): result[name] for result in results}
        for values in distinct.values():
            facts.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    return facts


if __name__ == "__main__":
    main()
