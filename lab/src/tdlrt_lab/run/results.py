"""The run directory: what a run writes, where, and how it is read again."""

import json
import math
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from tdlrt.errors import CheckpointError, RunError
from tdlrt.files import write_atomically
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import ImageRecord
from tdlrt_lab.yaml_files import read_yaml

__all__ = [
    "EpochMetrics",
    "RunDirectory",
    "is_finite_number",
    "machine",
    "numbered_checkpoint",
    "numbered_checkpoints",
    "parse_object",
    "stored_metrics",
    "versions",
    "write_text",
    "writing",
]

FILES = (
    "metrics.jsonl",
    "summary.json",
    "data.json",
    "diverged.txt",
    "checkpoints/last.pt",
    "checkpoints/previous-*.pt",
    "checkpoints/new.pt",
    "checkpoints/model.safetensors",
    "plots/accuracy.png",
    "plots/loss.png",
    "plots/compression.png",
    "plots/ranks.png",
    "config.yaml",
)
"""What a run writes; the configuration is deleted last, as it is what makes it a run."""

ENDINGS = ("", ".part", ".damaged")
"""Of a whole file, of one that a killed run left, and of a checkpoint that could not be read."""

FOLDERS = ("checkpoints", "plots")


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """What is known at the end of an epoch; a line of `metrics.jsonl`.

    Attributes:
        epoch: Number of the epoch, from 1.
        loss: Mean training loss over the epoch.
        train_accuracy: In percent, over the batches of the epoch as they were trained on.
        test_accuracy: In percent, of the network at the end of the epoch on the test images; None
            in a run that holds out validation images and leaves the test set alone.
        compression: Share of the factorised weights' parameters that is saved.
        network_compression: The same over all parameters.
        parameters: Parameters of the factorised weights; of the whole network if none is.
        ranks: Ranks of each factorised layer.
        lr: Learning rate of the last step.
        seconds: Duration of training and test.
        validation_accuracy: As test_accuracy, on the validation images; None without any.
        skipped_steps: Steps of the run so far that were skipped, as they were not finite.
    """

    epoch: int
    loss: float
    train_accuracy: float
    test_accuracy: float | None
    compression: float
    network_compression: float
    parameters: int
    ranks: dict[str, list[int]]
    lr: float
    seconds: float
    validation_accuracy: float | None = None
    skipped_steps: int = 0

    @property
    def split(self) -> Literal["test", "validation"]:
        """The images that `accuracy` is of."""
        return "test" if self.validation_accuracy is None else "validation"

    @property
    def accuracy(self) -> float:
        """In percent, of the network at the end of the epoch on the images of `split`."""
        found = {"test": self.test_accuracy, "validation": self.validation_accuracy}[self.split]
        return math.nan if found is None else found


class RunDirectory:
    """Paths of a run and the reading and writing of its files.

    Args:
        path: Where this process writes.
        public: What the user knows it by, which is the first process's; None for the same.
    """

    def __init__(self, path: str | Path, public: str | Path | None = None) -> None:
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
        """The checkpoints there are, the newest first."""
        return [path for _, path in sorted(numbered_checkpoints(self.checkpoint).items())]

    @property
    def lost(self) -> bool:
        """Whether the run there diverged before anything of it was stored."""
        return self.diverged.exists() and not self.checkpoints

    @property
    def public(self) -> "RunDirectory":
        """The directory that the user knows."""
        return RunDirectory(self._public)

    @property
    def baseline(self) -> "RunDirectory":
        """The directory of the dense run beside this one."""
        return RunDirectory(self.path / "baseline", self._public / "baseline")

    def claim(self, *, overwrite: bool) -> None:
        """Check, before anything is computed, that a new run may write here.

        Args:
            overwrite: Whether an earlier run may be here; nothing of it is deleted yet.

        Raises:
            RunError: The directory cannot be written, or holds something already.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            # A run that was killed at its very beginning leaves half of its configuration.
            holds_something = any(
                path.suffix != ".part" and path != self.lock for path in self.path.iterdir()
            )
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written ({error.strerror}); expected a directory for the "
                "results; choose another one with --out"
            ) from error
        if not holds_something:
            return
        if not self.config.exists():
            raise RunError(
                f"{self.path}: holds files that are no run of tdlrt; expected a new or empty "
                "directory; choose another one with --out"
            )
        self.read_config()
        self._check_links()
        if overwrite or self.lost:
            return
        if self.diverged.exists():
            raise RunError(
                f"{self.path}: holds a run that diverged, whose last good state is in "
                f"{self.public.checkpoints[0]}; replace it with --overwrite, or choose another "
                "directory with --out"
            )
        raise RunError(
            f"{self.path}: holds a run already; continue it with --resume, replace it with "
            "--overwrite, or choose another directory with --out"
        )

    def open_for_resume(self, config: RunConfig) -> None:
        """Check that this is a run with the options `config`.

        Raises:
            RunError: There is no run here, or it has other options.
        """
        if not self.config.exists():
            raise RunError(f"{self.path}: holds no run to resume; leave out --resume to start one")
        stored = self.read_config()
        self._check_links()
        names = config.differences(stored)
        if names and not self.lost:
            given = config.to_dict()
            changes = ", ".join(f"{n} {stored.get(n)!r} (now {given[n]!r})" for n in names)
            raise RunError(
                f"{self.path}: the run there has other options: {changes}; resume it with its own "
                "options, or start a new one in another directory"
            )

    def _check_links(self) -> None:
        """Refuse folders through which a run that came from elsewhere would write elsewhere."""
        for name in (*FOLDERS, "baseline", "tensorboard"):
            folder = self.path / name
            if folder.is_symlink() and not folder.resolve().is_relative_to(self.path.resolve()):
                raise RunError(
                    f"{folder}: is a link to {folder.resolve()}, outside the run; expected a "
                    "folder; put one in its place, or choose another directory with --out"
                )

    def clear(self) -> None:
        """Delete what an earlier run wrote here, and nothing else."""
        if self.baseline.config.exists():
            self.baseline.clear()
        for name in FILES:
            for file in (file for end in ENDINGS for file in self.path.glob(name + end)):
                file.unlink()
        self.clear_events()
        folders = [self.path / name for name in (*FOLDERS, "baseline", "tensorboard")]
        for folder in (*self.tensorboard.glob("*"), *folders):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def clear_events(self, method: str = "*") -> None:
        """Delete the TensorBoard files of a method, or of all."""
        for file in self.tensorboard.glob(f"{method}/events.out.tfevents.*"):
            file.unlink()

    def write_config(self, config: RunConfig) -> None:
        """Store the options of the run."""
        text = yaml.safe_dump(config.to_dict(), sort_keys=False)
        write_text(self.config, text)

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

    def write_data(self, found: ImageRecord) -> None:
        """Store what the run is trained on."""
        write_text(self.data, json.dumps(found, indent=2) + "\n")

    def check_data(self, found: ImageRecord) -> None:
        """Check that the run, as far as it got, was trained on these data.

        Raises:
            RunError: It was trained on others, or the record of them is broken.
        """
        # Earlier versions made no record.
        if not self.data.exists() or not (self.checkpoints or self.summary.exists()):
            return
        stored = self._read_data()
        changes = [
            f"{part} images: {_counted(stored.get(part))} (now {_counted(record)})"
            for part, record in found.items()
            if stored.get(part) != record
        ]
        if changes:
            raise RunError(
                f"{self.path}: the run there was trained on other data, {', '.join(changes)}; "
                "resume it with its own data, or start a new one in another directory"
            )

    def _read_data(self) -> dict[str, Any]:
        try:
            text = self.data.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise RunError(f"{self.data}: cannot be read ({error})") from error
        return parse_object(text, str(self.data), "record of the data of a run")

    def write_divergence(self, message: str) -> None:
        """Store why the run cannot go on."""
        write_text(self.diverged, message + "\n")

    def write_metrics(self, history: list[EpochMetrics]) -> None:
        """Write all lines of `metrics.jsonl` anew, so that none of them is ever half there."""
        text = "".join(json.dumps(asdict(metrics)) + "\n" for metrics in history)
        write_text(self.metrics, text)

    def read_metrics(self) -> list[EpochMetrics]:
        """All epochs of the run so far.

        Raises:
            OSError: The file cannot be read.
            ValueError: A line of it is broken.
        """
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        return [_metrics(line) for line in lines]

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Store the result; from then on the run counts as finished."""
        text = json.dumps(summary, indent=2) + "\n"
        write_text(self.summary, text)

    def read_summary(self) -> dict[str, Any]:
        """The result of a finished run.

        Raises:
            RunError: `summary.json` is missing or broken.
        """
        try:
            text = self.summary.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise RunError(f"{self.summary}: no result of a finished run ({error})") from error
        return parse_object(text, str(self.summary))


def numbered_checkpoint(newest: Path, number: int) -> Path:
    """Path of the checkpoint that is that many older than the newest."""
    return newest.with_name(f"previous-{number}.pt") if number else newest


def numbered_checkpoints(newest: Path) -> dict[int, Path]:
    """Those there are, by number."""
    found = {
        int(path.stem.removeprefix("previous-")): path
        for path in newest.parent.glob("previous-*.pt")
    }
    return found | ({0: newest} if newest.exists() else {})


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what to do where a file of a run cannot be written, such as on a full disk.

    Raises:
        RunError: It cannot.
    """
    try:
        yield
    except (OSError, CheckpointError) as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        raise RunError(
            f"{path}: cannot be written ({reason}); what was stored before is "
            "whole: make room for it, then continue with --resume"
        ) from error


def _counted(record: Any) -> str:
    """A part of a data set in a few words."""
    values = record if isinstance(record, dict) else {}
    return f"{values.get('images')} with digest {str(values.get('sha256'))[:12]}"


def write_text(path: Path, text: str) -> None:
    """Write a file of a run at once.

    Raises:
        RunError: It cannot be written.
    """
    with writing(path):
        write_atomically(path, lambda file: file.write(text.encode()))


def _metrics(line: str) -> EpochMetrics:
    try:
        return stored_metrics(json.loads(line))
    except RecursionError as error:
        raise ValueError(f"not the metrics of an epoch ({error})") from error


def is_finite_number(value: object) -> bool:
    """Whether a value that a file holds is a number, and neither infinite nor NaN."""
    # An integer may be too large for math.isfinite.
    return isinstance(value, int | float) and -math.inf < value < math.inf


def stored_metrics(values: Any) -> EpochMetrics:
    """The metrics of an epoch as a file holds them.

    Raises:
        ValueError: They are something else.
    """
    try:
        metrics = EpochMetrics(**values)
    except TypeError as error:
        raise ValueError(f"not the metrics of an epoch ({error})") from error
    numbers = {name: value for name, value in vars(metrics).items() if name != "ranks"}
    others = {name: v for name, v in numbers.items() if not isinstance(v, int | float)}
    if others not in ({}, {"test_accuracy": None}, {"validation_accuracy": None}):
        raise ValueError(f"got {numbers}, expected numbers")
    if not isinstance(metrics.ranks, dict) or not all(
        isinstance(name, str) and isinstance(row, list) and all(type(rank) is int for rank in row)
        for name, row in metrics.ranks.items()
    ):
        raise ValueError(f"ranks {metrics.ranks!r}: expected those of each layer")
    return metrics


def parse_object(text: str, place: str, what: str = "result of a finished run") -> dict[str, Any]:
    """The object that a JSON text of a run holds.

    Args:
        text: The text.
        place: Where it was written, for error messages.
        what: What it should be, for error messages.

    Raises:
        RunError: It is broken, or holds something else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{place}: no {what} ({error})") from error
    if not isinstance(value, dict):
        raise RunError(f"{place}: got {type(value).__name__}, expected an object")
    return value


def versions() -> dict[str, str]:
    """Versions of the software a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tdlrt": version("tdlrt"),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What of the machine a duration depends on; nothing that names the machine."""
    facts = {
        "architecture": platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts
