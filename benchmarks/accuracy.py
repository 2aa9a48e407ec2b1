"""Accuracy at equal size: does the runs of the experiments in experiments/recorded.

    python benchmarks/accuracy.py --data-dir DATA_DIR --only mnist_lenet5 --seeds 0 1 2

Records each result as a line of benchmarks/results/EXPERIMENT.jsonl; `results_table.py` turns them
into docs/results.md. Recorded runs are skipped. Run directories are kept in --runs: runs that were
interrupted continue when the script is started again. Several processes may share the work: each
takes runs that no other one has.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from rich.console import Console

from comparisons import EXPERIMENTS, RESULTS, stored_options
from tdlrt.errors import RunError, TdlrtError
from tdlrt_lab.cli.display import SweepDisplay
from tdlrt_lab.cli.screens import LineScreen
from tdlrt_lab.sweep.attempts import Event, command
from tdlrt_lab.sweep.checks import check_data
from tdlrt_lab.sweep.execute import execute
from tdlrt_lab.sweep.plan import SweepRun, read_sweep
from tdlrt_lab.sweep.recorded import read_results, record


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with NAME/train.parquet; default: the hub")
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        metavar="NAME",
        help="experiments, rows, or EXPERIMENT/ROW; * and ? stand for any text",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the experiment")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    arguments = parser.parse_args(words)
    try:
        sweeps = selected(arguments.only, arguments.seeds, arguments.data_dir, arguments.runs)
        if arguments.dry_run:
            print("\n".join(command(run.config) for runs in sweeps.values() for run in runs))
            return
        waiting = {name: list(unrecorded(name, runs)) for name, runs in sweeps.items()}
        failed = [run for name, runs in waiting.items() for run in failures(name, runs)]
    except TdlrtError as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit(f"error: {len(failed)} runs failed: {', '.join(failed)}")


def selected(
    names: Sequence[str], seeds: Sequence[int] | None, data_dir: str | None, out: Path
) -> dict[str, list[SweepRun]]:
    """The runs that are asked for, by experiment.

    Raises:
        RunError: A name fits nothing.
    """
    given = {"seeds": seeds, "data_dir": data_dir}
    overrides = {name: value for name, value in given.items() if value is not None}
    sweeps = {
        name: read_sweep(path, overrides).runs(out / name) for name, path in EXPERIMENTS.items()
    }
    rows = dict.fromkeys((name, run.row) for name, runs in sweeps.items() for run in runs)
    for name in names:
        if not any(_fits(name, *row) for row in rows):
            known = ", ".join(map("/".join, rows))
            raise RunError(f"--only {name}: fits no row; expected some of {known}")
    return {
        title: [run for run in runs if any(_fits(name, title, run.row) for name in names)]
        for title, runs in sweeps.items()
    }


def _fits(name: str, title: str, row: str) -> bool:
    return any(fnmatchcase(text, name) for text in (title, row, f"{title}/{row}"))


def unrecorded(name: str, runs: Sequence[SweepRun]) -> Iterator[SweepRun]:
    """The runs of an experiment that have no result yet.

    Raises:
        RunError: A result is that of a row whose options have changed since.
    """
    path = RESULTS / f"{name}.jsonl"
    recorded = {(result["row"], result["seed"]): result for result in read_results(path)}
    for run in runs:
        result = recorded.get((run.row, run.config.seed))
        if result is None:
            yield run
            continue
        print(f"{name}/{run.name}: done before")
        if differences := run.config.differences(stored_options(result)):
            raise RunError(
                f"{path}: the run of {run.name} had another {', '.join(differences)} than the row "
                "has now; delete its line and its run directory, or give the row another name"
            )


def failures(name: str, runs: Sequence[SweepRun]) -> list[str]:
    """Do runs of an experiment and record their results.

    Returns:
        Names of the runs that failed.

    Raises:
        DataError: A data set cannot be read.
        Interrupted: A signal stopped the runs.
    """
    if not runs:
        return []
    check_data(runs)
    display = SweepDisplay(LineScreen(Console()), runs)
    by_name = {run.name: run for run in runs}

    def show(event: Event) -> None:
        if event["event"] == "finished":
            run = by_name[event["run"]]
            summary = run.directory.read_summary()
            if run.config.data_dir is not None:
                summary["config"]["data_dir"] = "DATA_DIR"
            record(RESULTS / f"{name}.jsonl", run.row, summary)
        display.show(event)

    execute(runs, show)
    display.close(f"results in {RESULTS / name}.jsonl")
    return [f"{name}/{run}" for run in display.failed]


if __name__ == "__main__":
    main()
