"""Executing the runs of a sweep, in this process or in several."""

import json
import os
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import IO, Any

from tdlrt.errors import RunError, TdlrtError
from tdlrt_lab.config import RunConfig, torch_device
from tdlrt_lab.data import Data
from tdlrt_lab.rank_option import format_rank
from tdlrt_lab.run.environment import versions
from tdlrt_lab.run.files import write_text
from tdlrt_lab.run.liveness import SECONDS_OF_SILENCE, Silence
from tdlrt_lab.run.locks import exclusive
from tdlrt_lab.run.metrics import EpochMetrics
from tdlrt_lab.run.runner import Interrupted, Observer, run
from tdlrt_lab.run.signals import stop_requests
from tdlrt_lab.run.training import Training
from tdlrt_lab.sweep.plan import SweepError, SweepRun

__all__ = ["ALIVE", "Emit", "Event", "command", "execute", "fail", "pending", "work"]

Event = dict[str, Any]
Emit = Callable[[Event], None]
"""Called with each event, {"event": KIND, "run": NAME, ...}. The kinds are "started", "epoch",
"finished", "failed", and "busy" for a run that is skipped because another process does it."""

ALIVE: Event = {"event": "alive"}
"""What a worker writes between its other events; it is not emitted."""

WORKER = "tdlrt_lab.sweep.worker"
SHOWN = (
    *("accuracy", "bits_per_character", "compression", "network_compression"),
    *("parameters", "seconds"),
)


def execute(
    runs: Sequence[SweepRun], emit: Emit, *, jobs: int = 1, devices: Sequence[str] = ()
) -> None:
    """Do all runs that are neither finished nor being done by another process.

    A run that fails does not stop the others.

    Args:
        runs: The runs, in the order in which they start.
        emit: Called with each event, by one thread at a time.
        jobs: Number of runs at a time. A single one is done in this process; several are done in
            processes of their own, which share the CPU cores.
        devices: Devices, assigned to the processes in turn; if empty, each run chooses its own.

    Raises:
        SweepError: `devices` are given and a run names a device, too.
        ConfigError: A device is not available.
        Interrupted: A signal stopped the sweep; the same call continues it.
    """
    for device in devices:
        torch_device(device)
    for one in runs:
        if devices and one.config.device != "auto":
            raise SweepError(f"{one.name}: device {one.config.device!r} and --devices; drop one")
    waiting = pending(runs, emit)
    if jobs == 1 and not devices:
        work(waiting, emit)
    elif waiting:
        _Pool(waiting, emit, jobs, devices).serve()


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


class _Pool:
    """Worker processes that do one run each, and one thread per worker."""

    def __init__(
        self, runs: Sequence[SweepRun], emit: Emit, jobs: int, devices: Sequence[str]
    ) -> None:
        self._emit = emit
        self._emitting = threading.Lock()
        self._runs: queue.SimpleQueue[SweepRun] = queue.SimpleQueue()
        for one in runs:
            self._runs.put(one)
        self._processes: set[subprocess.Popen[str]] = set()
        self._stopping = threading.Event()
        self._silence = Silence(SECONDS_OF_SILENCE)
        self._killed: set[subprocess.Popen[str]] = set()
        environments = [
            _environment(jobs, devices[n % len(devices)] if devices else None) for n in range(jobs)
        ]
        self._threads = [threading.Thread(target=self._do_runs, args=(e,)) for e in environments]

    def serve(self) -> None:
        """Do all runs; a signal to this process is passed on to the workers once."""
        with stop_requests() as stop:
            for thread in self._threads:
                thread.start()
            try:
                while any(thread.is_alive() for thread in self._threads):
                    if stop.is_set() and not self._stopping.is_set():
                        self._stop()
                    self._kill_silent()
                    time.sleep(0.1)
            except KeyboardInterrupt:  # the second Ctrl-C
                self._stopping.set()
                for process in list(self._processes):
                    process.kill()
                raise
            finally:
                for thread in self._threads:
                    thread.join()
        if self._stopping.is_set():
            raise Interrupted("interrupted; what was trained so far is stored")

    def _stop(self) -> None:
        self._stopping.set()
        for process in list(self._processes):
            process.terminate()

    def _kill_silent(self) -> None:
        """Kill processes that are stopped: they would be waited for without end."""
        for process in self._processes & set(self._silence.silent()):
            self._killed.add(process)
            process.kill()

    def _tell(self, event: Event) -> None:
        with self._emitting:
            self._emit(event)

    def _do_runs(self, environment: dict[str, str]) -> None:
        while not self._stopping.is_set():
            try:
                one = self._runs.get_nowait()
            except queue.Empty:
                return
            with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
                self._do(one, environment, errors)

    def _do(self, one: SweepRun, environment: dict[str, str], errors: IO[str]) -> None:
        given = {"row": one.row, "out": str(one.out), "config": one.config.to_dict()}
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,  # so that Ctrl-C reaches only this process, which passes it on
        )
        self._processes.add(process)
        if self._stopping.is_set():
            process.terminate()
        with process:
            kinds = []
            for line in self._exchange(process, json.dumps(given)):
                self._silence.heard(process)
                kinds.append(self._pass_on(json.loads(line)))
        self._silence.forget(process)
        self._processes.discard(process)
        if process in self._killed:
            number, seconds = process.pid, f"{SECONDS_OF_SILENCE:g} seconds"
            text = f"its process {number} gave no sign of life for {seconds} and was killed"
            fail(one, self._tell, text)
        elif process.returncode and not self._stopping.is_set() and "failed" not in kinds:
            errors.seek(0)
            last = (errors.read().splitlines() or ["no message"])[-1]
            fail(one, self._tell, f"its process ended with exit code {process.returncode}: {last}")

    def _exchange(self, process: "subprocess.Popen[str]", given: str) -> Iterator[str]:
        """Send the run to a worker, and yield the lines that it prints."""
        if process.stdin is None or process.stdout is None:
            raise AssertionError("stdin and stdout of the worker are pipes")
        try:
            with process.stdin as file:
                file.write(given)
        except BrokenPipeError:  # the worker died before it read; its exit code is reported
            return
        yield from process.stdout

    def _pass_on(self, event: Event) -> str:
        if event != ALIVE:
            self._tell(event)
        return str(event["event"])


def _environment(jobs: int, device: str | None) -> dict[str, str]:
    """Environment variables of a worker: its number of threads, and the one GPU it may use."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    if device is not None:
        kind, _, number = device.partition(":")
        visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        index = int(number or 0)
        chosen = visible[index] if visible != [""] else str(index)
        environment["CUDA_VISIBLE_DEVICES"] = chosen if kind == "cuda" else ""
    return environment


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
