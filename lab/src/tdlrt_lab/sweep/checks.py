"""What is checked and written before the runs of a sweep start."""

import json
from collections.abc import Sequence
from pathlib import Path

from tdlrt.errors import RunError
from tdlrt_lab.data import load_data
from tdlrt_lab.run.environment import versions
from tdlrt_lab.run.files import write_text
from tdlrt_lab.sweep.plan import DESCRIPTION, Sweep, SweepRun

__all__ = ["check_data", "check_directories", "describe"]


def check_directories(runs: Sequence[SweepRun]) -> None:
    """Check that each run directory is new, or contains the same run.

    Raises:
        RunError: A directory contains other files, a run with different options, or a run that
            another version of tdlrt finished.
    """
    for run in runs:
        directory = run.directory
        if not directory.config.exists():
            directory.check_new(overwrite=False)
            continue
        directory.check_resume(run.config)
        if run.done:
            found = directory.read_summary().get("versions", {}).get("tdlrt")
            if found != versions()["tdlrt"]:
                raise RunError(
                    f"{directory.path}: written by tdlrt {found}, this is {versions()['tdlrt']}; "
                    "choose another directory with --out"
                )


def describe(sweep: Sweep, out: Path) -> None:
    """Store title and note of a sweep, for its report.

    Raises:
        RunError: They cannot be written.
    """
    text = json.dumps({"title": sweep.title, "note": sweep.note}, indent=2) + "\n"
    write_text(out / DESCRIPTION, text)


def check_data(runs: Sequence[SweepRun]) -> None:
    """Load each data set that an unfinished run needs, once; all runs must have begun with it.

    Raises:
        DataError: One of them cannot be read.
        RunError: A run, finished or not, was trained on other data.
    """
    for source in {_source(run) for run in runs if not run.done}:
        name, folder, images, size = source
        record = load_data(name, folder, train_images=images, image_size=size).record()
        for run in runs:
            if _source(run) == source:
                run.directory.check_data(record)


def _source(run: SweepRun) -> tuple[str, str | None, int | None, int | None]:
    config = run.config
    return config.data, config.data_dir, config.train_images, config.image_size
