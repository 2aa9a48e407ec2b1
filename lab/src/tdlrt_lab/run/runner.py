"""Doing a run: train the network and its dense baseline, and write the run directory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tdlrt.errors import ConfigError, NonFiniteError, RunError
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import Data, DataRecord, load_data
from tdlrt_lab.options import DEPENDS
from tdlrt_lab.run.checkpoint import (
    Checkpoints,
    CheckpointWriter,
    load_newest,
    save_model,
)
from tdlrt_lab.run.files import writing
from tdlrt_lab.run.locks import sole_owner
from tdlrt_lab.run.metrics import EpochMetrics
from tdlrt_lab.run.plots import draw_plots
from tdlrt_lab.run.processes import any_process, is_first, processes
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.run.signals import stop_requests
from tdlrt_lab.run.summary import run_summary
from tdlrt_lab.run.training import Training

__all__ = ["Interrupted", "Observer", "Observers", "run"]


class Interrupted(RunError):
    """A signal stopped the run; a checkpoint was written."""


class Observer:
    """Callbacks of a run; the methods of this base class do nothing."""

    def loading(self, part: str, done: int, total: int) -> None:
        """`done` of `total` images of a part of the data are decoded; text is read at once."""

    def started(self, training: Training, data: Data) -> None:
        """A training starts, or continues from a checkpoint."""

    def stepped(self, training: Training) -> None:
        """A step ended."""

    def epoch_ended(self, training: Training, metrics: EpochMetrics) -> None:
        """An epoch ended; its checkpoint and metrics are written."""

    def warned(self, message: str) -> None:
        """Something is wrong that does not stop the run."""

    def already_finished(self, directory: RunDirectory) -> None:
        """A run to be resumed is already finished."""

    def finished(self, summary: dict[str, Any]) -> None:
        """The run is complete; `summary` is the content of `summary.json`."""


class Observers(Observer):
    """Passes every call on to several observers, in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def loading(self, part: str, done: int, total: int) -> None:
        """Call all observers."""
        for observer in self._observers:
            observer.loading(part, done, total)

    def started(self, training: Training, data: Data) -> None:
        """Call all observers."""
        for observer in self._observers:
            observer.started(training, data)

    def stepped(self, training: Training) -> None:
        """Call all observers."""
        for observer in self._observers:
            observer.stepped(training)

    def epoch_ended(self, training: Training, metrics: EpochMetrics) -> None:
        """Call all observers."""
        for observer in self._observers:
            observer.epoch_ended(training, metrics)

    def warned(self, message: str) -> None:
        """Call all observers."""
        for observer in self._observers:
            observer.warned(message)

    def already_finished(self, directory: RunDirectory) -> None:
        """Call all observers."""
        for observer in self._observers:
            observer.already_finished(directory)

    def finished(self, summary: dict[str, Any]) -> None:
        """Call all observers."""
        for observer in self._observers:
            observer.finished(summary)


def run(
    config: RunConfig,
    out: str | Path,
    *,
    baseline: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    checkpoints: Checkpoints | None = None,
    observer: Observer | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Train a network and write the run directory.

    Args:
        config: Options of the run.
        out: Run directory; created if it does not exist.
        baseline: Also train the dense network, in `out/baseline`, with the same data, epochs and
            seed and with its own default learning rate.
        resume: Continue the run in `out`, and its baseline.
        overwrite: Replace an earlier run in `out`.
        checkpoints: When checkpoints are written and how many are kept; a resumed run may change
            it. By default one is written per epoch and the last one is kept.
        observer: Called during the run.
        command: The command line, to be stored in the summary.

    Returns:
        The content of `summary.json`.

    Raises:
        ConfigError: The arguments contradict each other.
        DataError: The data cannot be read.
        RunError: The directory or the checkpoints cannot be used, or the disk is full.
        NonFiniteError: The training diverged.
        Interrupted: A signal stopped the run.
    """
    if resume and overwrite:
        raise ConfigError("resume and overwrite: expected one of them, not both")
    if baseline and config.method == "dense":
        raise ConfigError("baseline: the method is 'dense' already; leave one of them out")
    with processes(config, Path(out), resume) as path:
        directory = RunDirectory(path, public=out)
        if observer is None or not is_first():
            observer = Observer()
        with sole_owner(directory, new=not resume):
            _check_directory(directory, config, baseline, resume, overwrite)
            resumed = [directory, *[directory.baseline] * baseline] if resume else []
            data, record = _load_data(resumed, config, observer)
            with stop_requests() as stop:
                job = _Job(
                    data=data,
                    record=record,
                    resume=resume,
                    checkpoints=checkpoints or Checkpoints(),
                    stop_requested=partial(any_process, stop.is_set, config.torch_device()),
                    observer=observer,
                    command=command,
                )
                summary = job.run(config, directory, draw=not baseline)
                if baseline:
                    dense = job.run(_dense(config), directory.baseline)
                    for name in ("accuracy", "bits_per_character"):
                        summary[f"dense_{name}"] = dense[name]
                    summary["dense_seconds"] = dense["seconds"]
                    _draw(directory, config)
                    directory.write_summary(summary)
            observer.finished(summary)
            return summary


def _check_directory(
    directory: RunDirectory, config: RunConfig, baseline: bool, resume: bool, overwrite: bool
) -> None:
    if not resume:
        directory.check_new(overwrite=overwrite)
        return
    directory.check_resume(config)
    if baseline and directory.baseline.config.exists():
        directory.baseline.check_resume(_dense(config))


def _load_data(
    resumed: Sequence[RunDirectory], config: RunConfig, observer: Observer
) -> tuple[Data, DataRecord]:
    """The data of a run, with a validation set held out, and the record of all of them."""
    data = load_data(
        config.data,
        config.data_dir,
        observer.loading,
        train_images=config.train_images,
        image_size=config.image_size,
    )
    record = data.record()
    for directory in resumed:
        directory.check_data(record)
        if directory.began_without_record:
            observer.warned(
                f"{directory.path}: nothing tells what data the run there was trained on, because "
                f"there is no {directory.data.name}; it continues with the present data"
            )
    if config.validation is not None:
        data = data.hold_out(config.validation, config.seed)
    if config.batch_size > data.epoch_examples:
        observer.warned(
            f"a batch of {config.batch_size} {data.unit} (--batch-size) is larger than an epoch "
            f"of {data.epoch_examples}: each step uses all of them"
        )
    return data, record


def _dense(config: RunConfig) -> RunConfig:
    """The options of the dense baseline: those of the run, as far as they apply to it."""
    return replace(config, method="dense", lr=DEPENDS, spectral_penalty=0.0)


def _draw(directory: RunDirectory, config: RunConfig) -> None:
    with writing(directory.plots):
        draw_plots(directory, config.method)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a run and its dense baseline share."""

    data: Data
    record: DataRecord
    resume: bool
    checkpoints: Checkpoints
    stop_requested: Callable[[], bool]
    observer: Observer
    command: str | None

    def run(
        self, config: RunConfig, directory: RunDirectory, *, draw: bool = True
    ) -> dict[str, Any]:
        """Train one network to the end, unless it is already finished, and draw its plots."""
        if self.resume and directory.summary.exists():
            self.observer.already_finished(directory)
            return directory.read_summary()
        device = config.torch_device()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            training = Training(config, self.data)
            self._prepare(training, directory)
            self._train(training, directory)
        save_model(training, directory.model)
        if draw:
            _draw(directory, config)
        summary = run_summary(training, self.record, self.command)
        directory.write_summary(summary)
        return summary

    def _prepare(self, training: Training, directory: RunDirectory) -> None:
        if self.resume:
            load_newest(training, directory.checkpoints, self.observer.warned)
        else:
            directory.clear()
        directory.diverged.unlink(missing_ok=True)
        directory.write_config(training.config)
        directory.write_data(self.record)
        directory.write_metrics(training.history)

    def _train(self, training: Training, directory: RunDirectory) -> None:
        self.observer.started(training, self.data)
        writer = CheckpointWriter(directory.checkpoint, self.checkpoints)

        def after_step(training: Training) -> None:
            self.observer.stepped(training)
            writer.after_step(training)

        try:
            for metrics in training.epochs(self.stop_requested, after_step):
                writer.write(training)
                directory.write_metrics(training.history)
                self.observer.epoch_ended(training, metrics)
        except NonFiniteError as error:
            directory.write_divergence(str(error))
            stored = directory.public.checkpoints
            where = f"the last good state is in {stored[0]}" if stored else "nothing was stored yet"
            raise NonFiniteError(f"{error}; {where}") from error
        if not training.finished:
            writer.write(training)
            raise Interrupted(
                f"interrupted after step {training.step} of {training.steps}; "
                f"the checkpoint is in {directory.public.checkpoint}"
            )
