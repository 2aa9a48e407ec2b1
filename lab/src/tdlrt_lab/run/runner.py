"""A run from its options to its directory: train, store, compare with the dense network."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tdlrt.errors import ConfigError, NonFiniteError, RunError
from tdlrt.report import LayerSummary
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import ImageData, ImageRecord, hold_out, load_data
from tdlrt_lab.options import DEPENDS
from tdlrt_lab.run.checkpoint import (
    Checkpoints,
    CheckpointWriter,
    load_newest,
    save_model,
)
from tdlrt_lab.run.environment import machine, versions
from tdlrt_lab.run.files import writing
from tdlrt_lab.run.locks import sole_owner
from tdlrt_lab.run.metrics import EpochMetrics
from tdlrt_lab.run.plots import draw_plots
from tdlrt_lab.run.processes import any_process, is_first, processes
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.run.signals import stop_requests
from tdlrt_lab.run.training import Training

__all__ = ["Interrupted", "Observer", "Observers", "run"]


class Interrupted(RunError):
    """A signal stopped the run; a checkpoint was written."""


class Observer:
    """What happens during a run, for whoever wants to show it. Does nothing by itself."""

    def loading(self, part: str, done: int, total: int) -> None:
        """Images of a part of the data are being decoded."""

    def started(self, training: Training, data: ImageData) -> None:
        """A network is about to be trained, from the beginning or from a checkpoint."""

    def stepped(self, training: Training) -> None:
        """A step was taken."""

    def epoch_ended(self, training: Training, metrics: EpochMetrics) -> None:
        """An epoch was finished and stored."""

    def warned(self, message: str) -> None:
        """Something was lost that the run can go on without."""

    def already_finished(self, directory: RunDirectory) -> None:
        """A run to be resumed was finished before."""

    def finished(self, summary: dict[str, Any]) -> None:
        """Everything is done; `summary` is the content of `summary.json`."""


class Observers(Observer):
    """Several observers, told in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def loading(self, part: str, done: int, total: int) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.loading(part, done, total)

    def started(self, training: Training, data: ImageData) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.started(training, data)

    def stepped(self, training: Training) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.stepped(training)

    def epoch_ended(self, training: Training, metrics: EpochMetrics) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.epoch_ended(training, metrics)

    def warned(self, message: str) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.warned(message)

    def already_finished(self, directory: RunDirectory) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.already_finished(directory)

    def finished(self, summary: dict[str, Any]) -> None:
        """Tell all."""
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
        out: Run directory; made if it does not exist.
        baseline: Train the dense network too, with the same data, epochs and seed and its own
            default learning rate, in `out/baseline`.
        resume: Continue what was interrupted in `out`, and do what of it was not begun.
        overwrite: Replace an earlier run in `out`.
        checkpoints: When they are written, and how many stay; they may be others at each start.
            None is one per epoch, of which the last one stays.
        observer: Told what happens.
        command: The command line, for the record.

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
        raise ConfigError("resume and overwrite: expected one of them; one keeps the run there")
    if baseline and config.method == "dense":
        raise ConfigError("baseline: the method is 'dense' already; leave one of them out")
    with processes(config, Path(out), resume) as place:
        told = observer if observer and is_first() else Observer()
        plan = checkpoints or Checkpoints()
        directory = RunDirectory(place, public=out)
        with sole_owner(directory, new=not resume):
            return _run(config, directory, baseline, resume, overwrite, plan, told, command)


def _run(
    config: RunConfig,
    directory: RunDirectory,
    baseline: bool,
    resume: bool,
    overwrite: bool,
    checkpoints: Checkpoints,
    observer: Observer,
    command: str | None,
) -> dict[str, Any]:
    dense_config = _dense(config)
    if resume:
        directory.check_resume(config)
        if baseline and directory.baseline.config.exists():
            directory.baseline.check_resume(dense_config)
    else:
        directory.check_new(overwrite=overwrite)
    data = load_data(
        config.data,
        config.data_dir,
        observer.loading,
        train_images=config.train_images,
        image_size=config.image_size,
    )
    record = data.record()
    if resume:
        directory.check_data(record)
    if config.validation is not None:
        data = hold_out(data, config.validation, config.seed)
    if config.batch_size > len(data.train_labels):
        observer.warned(
            f"a batch of {config.batch_size} images (--batch-size) is larger than the training set "
            f"of {len(data.train_labels)}: each step takes all of them"
        )
    with stop_requests() as stop:
        stop_requested = partial(any_process, stop.is_set, config.torch_device())
        job = _Job(data, record, resume, checkpoints, stop_requested, observer, command)
        summary = job.run(config, directory)
        if baseline:
            dense = job.run(dense_config, directory.baseline)
            summary |= {"dense_accuracy": dense["accuracy"], "dense_seconds": dense["seconds"]}
            _draw(directory, config)
            directory.write_summary(summary)
    observer.finished(summary)
    return summary


def _dense(config: RunConfig) -> RunConfig:
    """The dense network beside a run: the same options, as far as they mean something for it."""
    return replace(config, method="dense", lr=DEPENDS, spectral_penalty=0.0)


def _draw(directory: RunDirectory, config: RunConfig) -> None:
    with writing(directory.plots):
        draw_plots(directory, config.method)


class _Job:
    """What the run and its dense baseline have in common."""

    def __init__(
        self,
        data: ImageData,
        record: ImageRecord,
        resume: bool,
        checkpoints: Checkpoints,
        stop_requested: Callable[[], bool],
        observer: Observer,
        command: str | None,
    ) -> None:
        self.data = data
        self.record = record
        self.resume = resume
        self.checkpoints = checkpoints
        self.stop_requested = stop_requested
        self.observer = observer
        self.command = command

    def run(self, config: RunConfig, directory: RunDirectory) -> dict[str, Any]:
        """Train one network to the end, unless that was done before."""
        if self.resume and directory.summary.exists():
            self.observer.already_finished(directory)
            return directory.read_summary()
        device = config.torch_device()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            training = Training(config, self.data)
            self._open(training, directory)
            self._train(training, directory)
        save_model(training, directory.model)
        _draw(directory, config)
        summary = self._summary(training)
        directory.write_summary(summary)
        return summary

    def _open(self, training: Training, directory: RunDirectory) -> None:
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

        def stepped(training: Training) -> None:
            self.observer.stepped(training)
            writer.after_step(training)

        try:
            for metrics in training.epochs(self.stop_requested, stepped):
                writer.write(training)
                directory.write_metrics(training.history)
                self.observer.epoch_ended(training, metrics)
        except NonFiniteError as error:
            there = directory.public.checkpoints
            directory.write_divergence(str(error))
            stored = f"the last good state is in {there[0]}" if there else "nothing was stored yet"
            raise NonFiniteError(f"{error}; {stored}") from error
        if not training.finished:
            writer.write(training)
            raise Interrupted(
                f"interrupted after step {training.step} of {training.steps}; "
                f"the checkpoint is in {directory.public.checkpoint}"
            )

    def _summary(self, training: Training) -> dict[str, Any]:
        config, size, last = training.config, training.size, training.history[-1]
        cost, options = training.summary(), training.method.options
        return {
            "command": self.command,
            "model": config.model,
            "data": config.data,
            "method": config.method,
            "tau": config.tau if "tau" in options else None,
            "budget": config.budget if "budget" in options else None,
            "seed": config.seed,
            "epochs": config.epochs,
            "split": last.split,
            "accuracy": last.accuracy,
            "dense_accuracy": last.accuracy if config.method == "dense" else None,
            "compression": size.compression,
            "network_compression": size.network_compression,
            "parameters": last.parameters,
            "dense_parameters": size.dense_parameters or size.network_dense_parameters,
            "network_parameters": size.network_parameters,
            "network_dense_parameters": size.network_dense_parameters,
            "macs": cost.macs,
            "dense_macs": training.dense_macs,
            "ranks": last.ranks,
            "layers": [_layer(row) for row in cost.rows],
            "skipped_steps": training.skipped_steps,
            "seconds": sum(metrics.seconds for metrics in training.history),
            "dense_seconds": None,
            "versions": versions(),
            "machine": machine(training.device),
            "images": self.record,
            "config": config.to_dict(),
        }


def _layer(row: LayerSummary) -> dict[str, Any]:
    return {
        "name": row.name,
        "kind": row.kind,
        "shape": list(row.shape),
        "ranks": None if row.ranks is None else list(row.ranks),
        "parameters": row.parameters,
        "dense_parameters": row.dense_parameters,
        "compression": row.compression,
        "macs": row.macs,
        "dense_macs": row.dense_macs,
    }
