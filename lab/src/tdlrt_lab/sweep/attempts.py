"""Doing the runs of a sweep one after the other, and the events that tell of them."""

import json
import shlex
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from tdlrt.errors import RunError, TdlrtError
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import Data
from tdlrt_lab.rank_option import format_rank
from tdlrt_lab.run.environment import versions
from tdlrt_lab.run.files import write_text
from tdlrt_lab.run.locks import exclusive
from tdlrt_lab.run.metrics import EpochMetrics
from tdlrt_lab.run.runner import Interrupted, Observer, run
from tdlrt_lab.run.signals import stop_requests
from tdlrt_lab.run.training import Training
from tdlrt_lab.sweep.plan import SweepRun

__all__ = ["ALIVE", "Emit", "Event", "command", "fail", "pending", "work"]

Event = dict[str, Any]
Emit = Callable[[Event], None]
"""Called with each event, {"event": KIND, "run": NAME, ...}. The kinds are "started", "epoch",
"finished", "failed", and "busy" for a run that is skipped because another process does it."""

ALIVE: Event = {"event": "alive"}
"""What a worker writes between its other events; it is not emitted."""

SHOWN = (
    *("accuracy", "bits_per_character", "compression", "network_compression"),
    *("parameters", "seconds"),
)


def pending(runs: Sequence[SweepRun], emit: Emit) -> list[SweepRun]:
    """The runs that are not finished; the results of the others are emitted."""
    for one in runs:
        if one.done:
            emit(_finished(one, one.directory.read_summary()))
    return [one for one in runs if not one.done]


def work(runs: Sequence[SweepRun], emit: Emit) -> None:
    """Do runs one after the other in this process.

    Raises:
        Interrupted: A signal stopped the sweep.
    """
    with stop_requests() as stop:
        for one in runs:
            if stop.is_set():
                raise Interrupted(f"interrupted before {one.name}")
            _attempt(one, emit, stop)


def _attempt(one: SweepRun, emit: Emit, stop: threading.Event) -> None:
    with ExitStack() as stack:
        try:
            if not stack.enter_context(exclusive(one.lock)):
                emit({"event": "busy", "run": one.name})
                return
            summary = run(
                one.config,
                one.directory.path,
                resume=one.directory.config.exists(),
                observer=_Reporter(one, emit, stop),
                command=command(one.config),
            )
        except Interrupted as error:
            raise Interrupted(f"{one.name}: {error}") from error
        except Exception as error:  # any failure of one run must not stop the others
            fail(one, emit, error)
        else:
            with suppress(OSError):
                one.failure.unlink(missing_ok=True)
            emit(_finished(one, summary))


def _finished(one: SweepRun, summary: dict[str, Any]) -> Event:
    return {"event": "finished", "run": one.name, **{name: summary[name] for name in SHOWN}}


def fail(one: SweepRun, emit: Emit, error: Exception | str) -> None:
    """Store why a run failed, in a file beside its directory, and emit the event."""
    text, trace = str(error), ""
    if isinstance(error, Exception):
        trace = "".join(traceback.format_exception(error))
        if not isinstance(error, TdlrtError):
            text = f"{type(error).__name__}: {error}"
    config = one.config.to_dict()
    record = {"error": text, "traceback": trace, "versions": versions(), "config": config}
    try:
        write_text(one.failure, json.dumps(record, indent=2) + "\n", then="repeat the command")
    except RunError as failure:  # on a full disk, for example: the other runs are still tried
        text += f"; and {failure}"
    emit({"event": "failed", "run": one.name, "error": text})


class _Reporter(Observer):
    """Emits the events of a run, and stops it on request before its first step."""

    def __init__(self, one: SweepRun, emit: Emit, stop: threading.Event) -> None:
        self._name, self._emit, self._stop = one.name, emit, stop

    def loading(self, part: str, done: int, total: int) -> None:
        """Stop if that was requested."""
        self._check()

    def started(self, training: Training, data: Data) -> None:
        """Emit "started", with the epoch at which the run continues."""
        self._check()
        epochs = training.config.epochs
        self._emit(
            {"event": "started", "run": self._name, "epoch": training.epoch, "epochs": epochs}
        )

    def epoch_ended(self, training: Training, metrics: EpochMetrics) -> None:
        """Emit "epoch", with metrics."""
        self._emit(
            {
                "event": "epoch",
                "run": self._name,
                "epoch": metrics.epoch,
                "epochs": training.config.epochs,
                "accuracy": metrics.accuracy,
                "bits_per_character": metrics.bits_per_character,
                "compression": metrics.compression,
            }
        )

    def _check(self) -> None:
        if self._stop.is_set():
            raise Interrupted("interrupted before its first step")


def command(config: RunConfig) -> str:
    """The command line of a run: options that differ from their defaults, seed, tau and budget."""
    always = {"seed", *(name for name in ("tau", "budget") if config.used(name))}
    given: dict[str, Any] = {"model": config.model, "data": config.data, "budget": config.budget}
    default = RunConfig(method=config.method, optimizer=config.optimizer, **given).to_dict()
    default |= {"method": RunConfig.method, "optimizer": RunConfig(**given).optimizer}
    words = ["tdlrt", "train", config.model, "--data", config.data]
    if config.data_dir is not None:
        words += ["--data-dir", "DATA_DIR"]
    for name, value in config.to_dict().items():
        is_shown = value != default[name] or name in always
        if is_shown and value is not None and name != "data_dir":
            text = format_rank(value) if name == "rank" else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)
