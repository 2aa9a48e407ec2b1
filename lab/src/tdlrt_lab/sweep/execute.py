"""Executing the runs of a sweep, in this process or in several."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

from tdlrt_lab.config import torch_device
from tdlrt_lab.run.liveness import SECONDS_OF_SILENCE, Silence
from tdlrt_lab.run.runner import Interrupted
from tdlrt_lab.run.signals import stop_requests
from tdlrt_lab.sweep.attempts import ALIVE, Emit, Event, fail, pending, work
from tdlrt_lab.sweep.plan import SweepError, SweepRun

__all__ = ["execute"]

WORKER = "tdlrt_lab.sweep.worker"


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
