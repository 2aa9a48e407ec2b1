"""Write docs/results.md, and the table in the README, from the result files in benchmarks/results.

python benchmarks/results_table.py
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdlrt.errors import TdlrtError
from tdlrt.experiments.config import RunConfig
from tdlrt.experiments.results import read_results

ROOT = Path(__file__).parent.parent
PLACE = ("seed", "data_dir", "device")

BEGIN, END = "<!-- results -->", "<!-- end of results -->"

Result = dict[str, Any]

INTRODUCTION = """\
# Results

Written by `python benchmarks/results_table.py` from the result files in `benchmarks/results`; do
not edit. Numbers are means over the seeds, ± one standard deviation between them. Accuracy is
that of the test set after the last epoch. *Compression* is the share of parameters saved, over the
weights of the factorised layers and over the whole network; *MACs* are multiply-adds for one image.
Learning rates are the defaults of the command line. The tolerances were chosen after a look at the
test accuracy of seed 0, so the figures say what is reachable, not what a blind choice would give.
"""


def main() -> None:
    folders = sorted(path for path in (ROOT / "benchmarks/results").iterdir() if path.is_dir())
    try:
        results = {folder.name: read_results(folder) for folder in folders}
    except TdlrtError as error:
        sys.exit(f"error: {error}")
    target = ROOT / "docs" / "results.md"
    sections = [section(name, group) for name, group in results.items()]
    target.write_text("\n".join([INTRODUCTION, *sections]), encoding="utf-8")
    print(f"wrote {target.relative_to(ROOT)}")
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    tables = "\n\n".join(short_table(group) for group in results.values())
    readme.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}", encoding="utf-8")


def section(script: str, results: list[Result]) -> str:
    """The table of one benchmark, with how its numbers came about."""
    first = results[0]
    title = f"{first['model']} on {first['data']}"
    epochs, batch = first["epochs"], first["config"]["batch_size"]
    lines = [
        f"## {title}",
        "",
        f"{epochs} epochs, batch {batch}, `benchmarks/{script}.py`.",
        "",
        "| method | seeds | accuracy (%) | compression (%) | network (%) | parameters | MACs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups = grouped(results)
    lines += [row(label, group) for label, group in groups]
    lines += ["", "Commands, for the first seed of each row:", "", "```sh"]
    lines += [group[0]["command"] for _, group in groups]
    lines += ["```", "", *(f"- {fact}" for fact in provenance(results)), ""]
    return "\n".join(lines)


def short_table(results: list[Result]) -> str:
    """Accuracy and compression alone, for the README."""
    first = results[0]
    lines = [
        f"{first['model']} on {first['data']}, {first['epochs']} epochs, mean of "
        f"{max(len(group) for _, group in grouped(results))} seeds ± standard deviation:",
        "",
        "| method | accuracy (%) | compression of the factorised layers (%) |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| {' | '.join(cells(label, group)[:1] + cells(label, group)[2:4])} |"
        for label, group in grouped(results)
    ]
    return "\n".join(lines)


def grouped(results: list[Result]) -> list[tuple[str, list[Result]]]:
    """Runs that differ in their seed alone, under what they have in common: dense first."""
    groups: dict[str, list[Result]] = {}
    order = sorted(results, key=lambda r: (r["method"] != "dense", r["tau"] or 0.0, r["seed"]))
    for result in order:
        groups.setdefault(label(result["config"]), []).append(result)
    return list(groups.items())


def label(config: dict[str, Any]) -> str:
    """Method, tolerance, and every option that is not at its default."""
    default = RunConfig(model=config["model"], data=config["data"], method=config["method"])
    words = [config["method"]]
    if config["method"] == "tdlrt":
        words.append(f"tau {config['tau']:g}")
    for name, value in default.to_dict().items():
        if name not in (*PLACE, "tau") and config[name] != value:
            words.append(f"{name} {config[name]}")
    return ", ".join(words)


def row(label: str, group: list[Result]) -> str:
    """One line of the table."""
    return f"| {' | '.join(cells(label, group))} |"


def cells(label: str, group: list[Result]) -> list[str]:
    """Method, seeds, accuracy, compressions, parameters, multiply-adds."""
    seeds = ", ".join(str(result["seed"]) for result in group)
    texts = [label, seeds, spread([result["accuracy"] for result in group], 2)]
    for name in ("compression", "network_compression"):
        texts.append(spread([100 * result[name] for result in group], 1))
    for name in ("network_parameters", "macs"):
        texts.append(f"{statistics.mean(result[name] for result in group):,.0f}")
    return texts


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and, of several values that differ, standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(set(values)) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


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
