"""Stopped processes are waited for within a bound, and workers do not outlive their launcher."""

import os
import signal
import subprocess
import sys
import time

import pytest

from integrations.processes import TORCHRUN
from tdlrt_lab.run.liveness import Silence
from tdlrt_lab.sweep import execute as module
from tdlrt_lab.sweep.execute import execute
from tdlrt_lab.sweep.plan import Sweep


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_silence_is_counted_from_the_last_sign_of_life():
    clock = Clock()
    silence = Silence(60, clock)
    silence.heard("a")
    silence.heard("b")
    for clock.now in range(10, 61, 10):
        if clock.now == 30:
            silence.heard("b")
        assert silence.silent() == []
    clock.now = 61
    assert silence.silent() == ["a"]
    silence.forget("a")
    assert silence.silent() == []


def test_who_was_stopped_itself_accuses_nobody():
    clock = Clock()
    silence = Silence(60, clock)
    silence.heard("a")
    clock.now = 3600
    assert silence.silent() == []
    for clock.now in range(3610, 3661, 10):
        assert silence.silent() == []
    clock.now = 3661
    assert silence.silent() == ["a"]


SCRIPT = """
import os, sys, time
from tdlrt_lab.run import liveness
liveness.SECONDS_BETWEEN_SIGNS, liveness.SECONDS_OF_SILENCE = 0.2, float(sys.argv[2])
from tdlrt_lab.config import RunConfig
from tdlrt_lab.run.runner import Observer, run

class Tell(Observer):
    def epoch_ended(self, training, metrics):
        open(os.path.join(sys.argv[1], "epochs"), "a").write("1")

open(os.path.join(sys.argv[1], "pid" + os.environ["RANK"]), "w").write(str(os.getpid()))
options = {"model": "lenet5", "data": "digits", "batch_size": 256, "device": "cpu"}
run(RunConfig(**options, epochs=int(sys.argv[3])), sys.argv[1] + "/run", observer=Tell())
"""


@pytest.fixture
def launch(tmp_path):
    """Start two processes that train, and wait for the end of an epoch."""

    def start(silence=5, epochs=10_000):
        (tmp_path / "script.py").write_text(SCRIPT)
        words = [*TORCHRUN, "--log-dir", tmp_path / "log", tmp_path / "script.py", tmp_path]
        launcher = subprocess.Popen(
            [*map(str, words), str(silence), str(epochs)], stderr=subprocess.PIPE, text=True
        )
        until(lambda: launcher.poll() is not None or (tmp_path / "epochs").exists())
        return launcher, [int((tmp_path / f"pid{n}").read_text()) for n in (0, 1)]

    return start


def until(holds, seconds=120):
    for _ in range(10 * seconds):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("it never held")


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_worker_is_named(launch, stopped):
    launcher, pids = launch()
    os.kill(pids[stopped], signal.SIGSTOP)
    until(lambda: not alive(pids[1 - stopped]), 30)
    os.kill(pids[stopped], signal.SIGCONT)  # torchrun would wait 30 seconds for it
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert f"process {stopped} of 2 has given no sign of life for 5 seconds" in errors


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_their_launcher_and_store_a_checkpoint(launch, tmp_path):
    launcher, pids = launch(silence=60)
    launcher.kill()
    until(lambda: not any(map(alive, pids)), 30)
    assert (tmp_path / "run" / "checkpoints" / "last.pt").exists()
    assert "interrupted after step" in launcher.communicate()[1]


@pytest.mark.slow
def test_a_run_that_ends_in_order_accuses_nobody(launch):
    launcher, _ = launch(silence=60, epochs=2)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0 and "sign of life" not in errors


@pytest.fixture
def one_run(tmp_path):
    options = {"model": "lenet5", "data": "digits", "epochs": 10_000, "batch_size": 256}
    return Sweep(options=options, rows={"a": {"method": "dense"}}).runs(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stopped_process_of_a_sweep_is_a_failure_of_its_run(one_run, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_OF_SILENCE", 8.0)
    events = []

    def emit(event):
        if event["event"] == "epoch" and event["epoch"] == 1:
            os.kill(child(), signal.SIGSTOP)
        events.append(event)

    execute(one_run, emit, devices=["cpu"])
    assert events[-1]["event"] == "failed"
    assert "gave no sign of life for 8 seconds and was killed" in events[-1]["error"]
    assert one_run[0].failure.exists()


SWEEP = """
import sys
from pathlib import Path
from tdlrt_lab.sweep.execute import execute
from tdlrt_lab.sweep.plan import Sweep

options = {"model": "lenet5", "data": "digits", "epochs": 10_000, "batch_size": 256}
runs = Sweep(options=options, rows={"a": {"method": "dense"}}).runs(Path(sys.argv[1]))
execute(runs, lambda event: print(event, flush=True), devices=["cpu"])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_of_a_sweep_ends_with_the_sweep(one_run, tmp_path):
    words = [sys.executable, "-c", SWEEP, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as sweep:
        while "'epoch'" not in sweep.stdout.readline():
            assert sweep.poll() is None
        worker = child(sweep.pid)
        sweep.kill()
    until(lambda: not alive(worker), 30)
    assert one_run[0].directory.checkpoint.exists() and not one_run[0].failure.exists()


def child(process=None):
    """The child of a process whose command is a worker of a sweep (Linux)."""
    process = process or os.getpid()
    children = []
    for task in os.listdir(f"/proc/{process}/task"):
        with open(f"/proc/{process}/task/{task}/children") as file:
            children += map(int, file.read().split())
    for pid in children:
        with open(f"/proc/{pid}/cmdline") as file:
            if module.WORKER in file.read():
                return pid
    raise AssertionError("no worker")
