"""Accuracy at equal size: runs the experiments of `comparisons.py`, one run after the other.

    python benchmarks/accuracy.py --data-dir DATA_DIR --only mnist_lenet5 --seeds 0 1 2

Writes one small JSON file per run to benchmarks/results/EXPERIMENT/ROW_seedN.json;
`results_table.py` turns them into docs/results.md. Run directories are kept in --runs: finished
runs are skipped and interrupted ones continue when the script is started again. Several processes
may share the work: each takes runs that no other one has.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from comparisons import EXPERIMENTS, RESULTS, stored_options
from tdlrt.errors import NonFiniteError, RunError, TdlrtError
from tdlrt.files import write_atomically
from tdlrt_lab.config import RunConfig
from tdlrt_lab.run.results import EpochMetrics, RunDirectory
from tdlrt_lab.run.runner import Interrupted, Observer, run
from tdlrt_lab.run.training import Training
from tdlrt_lab.sweep.execute import command, exclusive


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of an experiment: its options, its directory, its result file."""

    config: RunConfig
    directory: Path
    result: Path

    @property
    def name(self) -> str:
        """Experiment, row and seed."""
        return f"{self.result.parent.name}/{self.result.stem}"


class Lines(Observer):
    """A line per epoch."""

    def epoch_ended(self, training: Training, metrics: EpochMetrics) -> None:
        """Print accuracy and compression."""
        print(
            f"  epoch {metrics.epoch}  accuracy {metrics.accuracy:.2f} %  "
            f"compression {100 * metrics.compression:.1f} %  {metrics.seconds:.1f} s",
            flush=True,
        )


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
        jobs = selected(arguments.only, arguments.seeds, arguments.data_dir, arguments.runs)
        if arguments.dry_run:
            print("\n".join(command(job.config) for job in jobs))
            return
        for job in jobs:
            check_options(job)
        failed = [job.name for job in jobs if not succeeds(job)]
    except TdlrtError as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit(f"error: {len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}")


def selected(
    names: Sequence[str], seeds: Sequence[int] | None, data_dir: str | None, runs: Path
) -> list[Job]:
    """The runs that are asked for, all rows of a seed before the next seed.

    Raises:
        RunError: A name fits nothing.
    """
    for name in names:
        if not any(_fits(name, title, row) for title, e in EXPERIMENTS.items() for row in e.rows):
            known = ", ".join(
                f"{title}/{row}" for title, e in EXPERIMENTS.items() for row in e.rows
            )
            raise RunError(f"--only {name}: fits no row; expected some of {known}")
    return [
        Job(
            config=experiment.config(row, seed, data_dir),
            directory=runs / title / f"{row}_seed{seed}",
            result=RESULTS / title / f"{row}_seed{seed}.json",
        )
        for title, experiment in EXPERIMENTS.items()
        for seed in seeds or experiment.seeds
        for row in experiment.rows
        if any(_fits(name, title, row) for name in names)
    ]


def _fits(name: str, title: str, row: str) -> bool:
    return any(fnmatchcase(text, name) for text in (title, row, f"{title}/{row}"))


def succeeds(job: Job) -> bool:
    """Do one run and store its result, unless it was done before or another process has it.

    Returns:
        Whether there is nothing to complain about.

    Raises:
        Interrupted: A signal stopped the run.
    """
    with exclusive(job.directory.with_name(f"{job.directory.name}.lock")) as mine:
        if not mine:
            print(f"{job.name}: another process is at it")
        elif job.result.exists():
            print(f"{job.name}: done before")
        else:
            return measure(job)
    return True


def measure(job: Job) -> bool:
    """Do one run; one that fails is reported and gives False."""
    print(job.name, flush=True)
    started = RunDirectory(job.directory).config.exists()
    try:
        summary = run(
            job.config,
            job.directory,
            resume=started,
            observer=Lines(),
            command=command(job.config),
        )
    except Interrupted:
        raise
    except (RunError, NonFiniteError) as error:
        print(f"{job.name}: failed: {error}", file=sys.stderr)
        return False
    if job.config.data_dir is not None:
        summary["config"]["data_dir"] = "DATA_DIR"
    text = json.dumps(summary, indent=2) + "\n"
    write_atomically(job.result, lambda file: file.write(text.encode()))
    return True


def check_options(job: Job) -> None:
    """Refuse to take a result for that of a row whose options have changed since.

    Raises:
        RunError: They differ.
    """
    if not job.result.exists():
        return
    stored = stored_options(json.loads(job.result.read_text(encoding="utf-8")))
    differences = job.config.differences(stored)
    if differences:
        raise RunError(
            f"{job.result}: its run had another {', '.join(differences)} than the row has now; "
            "delete it and its run directory, or give the row another name"
        )


if __name__ == "__main__":
    main()
