"""The run directory: the files of a run, where they are, and how they are written and read."""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from tdlrt.errors import RunError
from tdlrt.files import MAX_TEXT, PART, read_text, remove_parts
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import DataRecord
from tdlrt_lab.run.files import check_own, read_object, write_text
from tdlrt_lab.run.metrics import EpochMetrics
from tdlrt_lab.run.stored_summary import checked_summary
from tdlrt_lab.yaml_files import read_yaml

__all__ = ["MAX_METRICS", "RunDirectory", "numbered_checkpoint", "numbered_checkpoints"]

FILES = (
    "metrics.jsonl",
    "summary.json",
    "data.json",
    "diverged.txt",
    "checkpoints/last.pt",
    "checkpoints/new.pt",
    "checkpoints/model.safetensors",
    "plots/accuracy.png",
    "plots/bits_per_character.png",
    "plots/loss.png",
    "plots/compression.png",
    "plots/ranks.png",
    "config.yaml",
)
"""The files that a run writes. `config.yaml`, which marks a run directory, is deleted last."""

PREVIOUS = re.compile(r"previous-([1-9][0-9]{0,8})\.pt")
"""Name of a checkpoint that is not the newest; other names are those of files of the user."""

DAMAGED = ".damaged"

FOLDERS = ("checkpoints", "plots")

MAX_METRICS = 2**26
"""Bytes of `metrics.jsonl`: 16,000 epochs of a network with 100 layers."""


class RunDirectory:
    """The paths of a run, and methods that read, write and check its files.

    Args:
        path: Where this process writes.
        public: The directory of the first process, which messages name; None for `path`.

    Raises:
        RunError: No directory can have that path.
    """

    def __init__(self, path: str | Path, public: str | Path | None = None) -> None:
        if "\0" in str(path):
            raise RunError(f"out {str(path)!r}: contains a NUL; expected the path of a directory")
        self.path = Path(path)
        self._public = self.path if public is None else Path(public)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.checkpoint = self.path / "checkpoints" / "last.pt"
        self.model = self.path / "checkpoints" / "model.safetensors"
        self.plots = self.path / "plots"
        self.tensorboard = self.path / "tensorboard"
        self.data = self.path / "data.json"
        self.diverged = self.path / "diverged.txt"
        self.lock = self.path / ".lock"

    @property
    def checkpoints(self) -> list[Path]:
        """The existing checkpoints, the newest first."""
        return [path for _, path in sorted(numbered_checkpoints(self.checkpoint).items())]

    @property
    def lost(self) -> bool:
        """Whether the run diverged before its first checkpoint."""
        return self.diverged.exists() and not self.checkpoints

    @property
    def began(self) -> bool:
        """Whether a training has stored a checkpoint or a result."""
        return bool(self.checkpoints) or self.summary.exists()

    @property
    def began_without_record(self) -> bool:
        """Whether a training began and left no `data.json`: earlier versions wrote none."""
        return self.began and not self.data.exists()

    @property
    def public(self) -> "RunDirectory":
        """The directory of the first process, which messages name."""
        return RunDirectory(self._public)

    @property
    def baseline(self) -> "RunDirectory":
        """The directory of the dense baseline."""
        return RunDirectory(self.path / "baseline", self._public / "baseline")

    def check_new(self, *, overwrite: bool) -> None:
        """Check that a new run may write here.

        Args:
            overwrite: Accept a directory with an earlier run; this method deletes nothing.

        Raises:
            RunError: The directory cannot be written, or is not empty.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            # A run that was killed while it wrote config.yaml leaves only a part of it.
            occupied = any(
                path.suffix != PART and path != self.lock for path in self.path.iterdir()
            )
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written ({error.strerror}); expected a directory for the "
                "results; choose another one with --out"
            ) from error
        if not occupied:
            return
        if not self.config.exists():
            raise RunError(
                f"{self.path}: contains files, but not a run of tdlrt; expected a new or empty "
                "directory; choose another one with --out"
            )
        self.read_config()
        self._check_links()
        if overwrite or self.lost:
            return
        if self.diverged.exists():
            raise RunError(
                f"{self.path}: contains a run that diverged; its last good state is in "
                f"{self.public.checkpoints[0]}; replace it with --overwrite, or choose another "
                "directory with --out"
            )
        raise RunError(
            f"{self.path}: already contains a run; continue it with --resume, replace it with "
            "--overwrite, or choose another directory with --out"
        )

    def check_resume(self, config: RunConfig) -> None:
        """Check that the directory contains a run with the options `config`.

        Raises:
            RunError: It contains no run, or one with different options.
        """
        if not self.config.exists():
            raise RunError(
                f"{self.path}: contains no run to resume; leave out --resume to start one"
            )
        stored = self.read_config()
        self._check_links()
        names = config.differences(stored)
        if names and not self.lost:
            given = config.to_dict()
            changes = ", ".join(f"{n} {stored.get(n)!r} (now {given[n]!r})" for n in names)
            raise RunError(
                f"{self.path}: the run there has different options: {changes}; resume it with its "
                "own options, or start a new one in another directory"
            )

    def _check_links(self) -> None:
        """Refuse folders that are links out of the run: a copied run must not write elsewhere."""
        for folder in reversed(list(self._folders())):
            check_own(folder, within=self.path)

    def _folders(self) -> Iterator[Path]:
        """The folders of the run and of its baseline, each after those in it."""
        for path in (self.path / "baseline", self.path):
            yield from (path / name for name in FOLDERS)
        yield from self.tensorboard.glob("*")
        yield from (self.tensorboard, self.path / "baseline")

    def remove_parts(self) -> None:
        """Delete what killed runs left of files that they were writing."""
        self._check_links()
        for folder in (self.path, *self._folders()):
            remove_parts(folder)

    def clear(self) -> None:
        """Delete the files of an earlier run, and nothing else."""
        if self.baseline.config.exists():
            self.baseline.clear()
        self._check_links()
        checkpoints = [path for _, path in numbered_checkpoints(self.checkpoint).items()]
        damaged = list(self.checkpoint.parent.glob(f"*.pt{DAMAGED}"))
        for file in (*checkpoints, *damaged, *(self.path / name for name in FILES)):
            file.unlink(missing_ok=True)
        self.clear_events()
        for folder in self._folders():
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def clear_events(self, method: str = "*") -> None:
        """Delete the TensorBoard files of one method, or of all methods."""
        self._check_links()
        for file in self.tensorboard.glob(f"{method}/events.out.tfevents.*"):
            file.unlink()

    def write_config(self, config: RunConfig) -> None:
        """Store the options of the run."""
        write_text(self.config, yaml.safe_dump(config.to_dict(), sort_keys=False))

    def read_config(self) -> dict[str, Any]:
        """The options stored in `config.yaml`.

        Raises:
            RunError: The file cannot be read or is not the configuration of a run.
        """
        try:
            stored = read_yaml(self.config)
        except ValueError as error:
            raise RunError(f"{self.config}: {error}") from error
        if not isinstance(stored, dict) or not {"model", "data", "method"} <= stored.keys():
            raise RunError(
                f"{self.config}: not the configuration of a run of tdlrt; expected the options "
                "model, data and method; choose another directory with --out"
            )
        return stored

    def write_data(self, found: DataRecord) -> None:
        """Store the record of the data that the run is trained on."""
        write_text(self.data, json.dumps(found, indent=2) + "\n")

    def check_data(self, found: DataRecord) -> None:
        """Check that a run to be resumed was trained on these data.

        Raises:
            RunError: It was trained on other data, or `data.json` cannot be read.
        """
        if not self.began or self.began_without_record:
            return
        stored = read_object(self.data, "record of the data of a run")
        changes = [
            f"{part} {_describe(stored.get(part), record)} (now {_describe(record, record)})"
            for part, record in found.items()
            if stored.get(part) != record
        ]
        if changes:
            raise RunError(
                f"{self.path}: the run there was trained on different data, {', '.join(changes)}; "
                "resume it with its own data, or start a new one in another directory"
            )

    def write_divergence(self, message: str) -> None:
        """Store why the run diverged."""
        write_text(self.diverged, message + "\n")

    def write_metrics(self, history: list[EpochMetrics]) -> None:
        """Rewrite `metrics.jsonl` atomically, so that it never ends in half a line."""
        text = "".join(json.dumps(asdict(metrics)) + "\n" for metrics in history)
        write_text(self.metrics, text)

    def read_metrics(self) -> list[EpochMetrics]:
        """The metrics of all finished epochs.

        Raises:
            OSError: The file cannot be read.
            ValueError: A line is not valid.
        """
        lines = read_text(self.metrics, max_bytes=MAX_METRICS).splitlines()
        try:
            return [EpochMetrics.from_dict(json.loads(line)) for line in map(_of_an_epoch, lines)]
        except RecursionError as error:
            raise ValueError(f"not the metrics of an epoch ({error})") from error

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Store the result, which marks the run as finished."""
        write_text(self.summary, json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """The result of a finished run.

        Raises:
            RunError: `summary.json` is missing or damaged, or lacks a value.
        """
        summary = read_object(self.summary, "result of a finished run")
        return checked_summary(summary, str(self.summary))


def numbered_checkpoint(newest: Path, number: int) -> Path:
    """Path of the checkpoint that is `number` checkpoints older than the newest."""
    return newest.with_name(f"previous-{number}.pt") if number else newest


def numbered_checkpoints(newest: Path) -> dict[int, Path]:
    """The existing checkpoints by number; 0 is the newest."""
    matches = [(PREVIOUS.fullmatch(path.name), path) for path in newest.parent.glob("previous-*")]
    found = {int(match[1]): path for match, path in matches if match}
    return found | ({0: newest} if newest.exists() else {})


def _of_an_epoch(line: str) -> str:
    if len(line) > MAX_TEXT:
        raise ValueError(f"a line of more than {MAX_TEXT:,} characters")
    return line


def _describe(record: Any, names: Iterable[str]) -> str:
    """The sizes with these names and the abbreviated digest of a part of a data set."""
    values = record if isinstance(record, dict) else {}
    sizes = ", ".join(f"{name}: {values.get(name)}" for name in names if name != "sha256")
    return f"{sizes} with digest {str(values.get('sha256'))[:12]}"
