import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tdlrt.errors import ConfigError, RunError
from tdlrt_lab.cli.app import run_app
from tdlrt_lab.config import RunConfig
from tdlrt_lab.run.locks import exclusive
from tdlrt_lab.run.runner import Interrupted
from tdlrt_lab.sweep import attempts
from tdlrt_lab.sweep import execute as module
from tdlrt_lab.sweep.attempts import command
from tdlrt_lab.sweep.execute import execute
from tdlrt_lab.sweep.plan import Sweep, SweepError

SHARED = {"model": "lenet5", "data": "digits", "epochs": 2, "batch_size": 256}
ROWS = {"dense": {"method": "dense"}, "tdlrt": {"budget": 0.2}}


@pytest.fixture
def runs(tmp_path):
    return Sweep(options=SHARED, rows=ROWS).runs(tmp_path)


def kinds(events):
    return [(event["event"], event["run"].partition("/")[0]) for event in events]


def test_runs_are_done_once(runs):
    events = []
    execute(runs, events.append)
    steps = ["started", "epoch", "epoch", "finished"]
    assert kinds(events) == [(step, row) for row in ("dense", "tdlrt") for step in steps]
    summary = runs[1].directory.read_summary()
    assert events[-1]["accuracy"] == summary["accuracy"]
    assert summary["command"].startswith("tdlrt train lenet5 --data digits --budget 0.2")
    before = runs[1].directory.summary.read_bytes()
    events.clear()
    execute(runs, events.append)
    assert kinds(events) == [("finished", "dense"), ("finished", "tdlrt")]
    assert runs[1].directory.summary.read_bytes() == before


def test_a_failure_is_stored_and_the_others_go_on(tmp_path):
    runs = Sweep(options=SHARED, rows={"bad": {"method": "dense", "lr": 1e20}, **ROWS}).runs(
        tmp_path
    )
    events = []
    execute(runs, events.append)
    ends = [kind for kind in kinds(events) if kind[0] in ("failed", "finished")]
    assert ends == [("failed", "bad"), ("finished", "dense"), ("finished", "tdlrt")]
    record = json.loads(runs[0].failure.read_text())
    assert record["error"].startswith("step 2 of 12: the loss (nan)")
    assert "Traceback" in record["traceback"]
    assert record["config"]["lr"] == 1e20


def test_errors_that_nobody_foresaw_are_failures_of_one_run_too(runs, monkeypatch):
    real = attempts.run

    def broken(config, *rest, **options):
        if config.method == "dense":
            raise ZeroDivisionError("by zero")
        return real(config, *rest, **options)

    monkeypatch.setattr(attempts, "run", broken)
    events = []
    execute(runs, events.append)
    assert events[0]["error"] == "ZeroDivisionError: by zero"
    assert events[-1]["event"] == "finished"
    monkeypatch.setattr(attempts, "run", real)
    execute(runs, events.append)
    assert not runs[0].failure.exists()  # it is tried again, and done


def test_a_run_of_another_process_is_left_to_it(runs):
    events = []
    with exclusive(runs[0].lock) as mine:
        assert mine
        execute(runs, events.append)
    assert kinds(events)[0] == ("busy", "dense")
    assert kinds(events)[-1] == ("finished", "tdlrt")


def test_a_signal_stops_the_sweep_and_the_same_call_continues_it(runs):
    def stop(event):
        if event["event"] == "epoch":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"dense/seed0: interrupted after step"):
        execute(runs, stop)
    assert not runs[0].done
    events = []
    execute(runs, events.append)
    assert events[0] == {"event": "started", "run": "dense/seed0", "epoch": 1, "epochs": 2}
    assert kinds(events).count(("epoch", "dense")) == 1
    assert all(run.done for run in runs)


def test_a_signal_while_data_are_read_loses_nothing(runs, monkeypatch):
    def interrupt(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    real = attempts.run.__globals__["load_data"]
    monkeypatch.setitem(attempts.run.__globals__, "load_data", interrupt)
    with pytest.raises(Interrupted, match=r"dense/seed0: interrupted before its first step"):
        execute(runs, lambda event: None)
    assert not runs[0].failure.exists()


def test_devices_are_checked_first(runs):
    with pytest.raises(ConfigError, match=r"device 'cuda:99': not available"):
        execute(runs, print, devices=["cuda:99"])
    (run,) = Sweep(options={**SHARED, "device": "cpu"}, rows={"a": {}}).runs("out")
    with pytest.raises(SweepError, match=r"a/seed0: device 'cpu' and --devices; drop one"):
        execute([run], print, devices=["cpu"])


def test_a_process_sees_its_device_alone(monkeypatch):
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": "4,7"})
    assert module._environment(1, "cuda:1")["CUDA_VISIBLE_DEVICES"] == "7"
    monkeypatch.setattr(os, "environ", {})
    assert module._environment(1, "cuda:1")["CUDA_VISIBLE_DEVICES"] == "1"
    assert module._environment(1, "cuda")["CUDA_VISIBLE_DEVICES"] == "0"
    assert module._environment(1, "cpu")["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in module._environment(1, None)
    assert module._environment(10**6, None)["OMP_NUM_THREADS"] == "1"


@pytest.mark.slow
def test_processes_share_the_runs(tmp_path):
    bad = {"bad": {"method": "dense", "lr": 1e20}}
    runs = Sweep(options=SHARED, rows={**bad, **ROWS}).runs(tmp_path)
    events = []
    execute(runs, events.append, jobs=2)
    ends = {kind for kind in kinds(events) if kind[0] in ("failed", "finished")}
    assert ends == {("failed", "bad"), ("finished", "dense"), ("finished", "tdlrt")}
    assert runs[0].failure.exists()


@pytest.mark.slow
def test_a_process_that_dies_is_a_failure_of_its_run(runs, monkeypatch):
    monkeypatch.setattr(module, "WORKER", "tdlrt.no_such_module")
    events = []
    execute(runs[:1], events.append, devices=["cpu"])
    assert events[0]["error"].startswith("its process ended with exit code 1: ")
    assert "No module named tdlrt.no_such_module" in events[0]["error"]


@pytest.mark.slow
def test_a_signal_reaches_the_processes_once(tmp_path):
    (run,) = Sweep(options={**SHARED, "epochs": 500}, rows={"a": {}}).runs(tmp_path)

    def stop(event):
        if event["event"] == "epoch" and event["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    started = time.monotonic()
    with pytest.raises(Interrupted, match=r"what was trained so far is stored"):
        execute([run], stop, devices=["cpu"])
    assert time.monotonic() - started < 120
    assert run.directory.checkpoint.exists()
    assert not run.failure.exists()
    assert not run.done


def test_broken_results_are_named(runs):
    runs[0].directory.path.mkdir(parents=True)
    runs[0].directory.summary.write_text("{")
    with pytest.raises(RunError, match=r"summary\.json: cannot read the result of a finished run"):
        execute(runs, print)


def test_the_lock_of_a_killed_process_is_open(tmp_path):
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); "
        "fcntl.flock(file, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(60)"
    )
    lock = tmp_path / "row.lock"
    words = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        with exclusive(lock) as mine:
            assert not mine
        process.kill()
    with exclusive(lock) as mine:
        assert mine


COMMANDS = [
    {"method": "dense", "optimizer": "adam"},
    {"tau": 0.1},
    {"budget": 0.05, "ramp": "cubic", "spare": 0.25, "optimizer": "adamw", "warmup": 0.1},
    {"method": "tucker", "rank": {"conv?": [3, 1, 5, 5], "*": 0.5}, "lr": 0.05, "seed": 3},
    {"rank": "full", "init_scale": 0.3, "integrator": "bug", "core_steps": 4, "device": "cpu"},
    {"train_images": 500, "weight_decay": 5e-4, "momentum": 0.0, "freeze_at": 1.0, "lr": 1e-5},
]


@pytest.mark.parametrize("options", COMMANDS, ids=str)
def test_the_stored_command_does_the_run(monkeypatch, options):
    config = RunConfig(model="lenet5", data="mnist", data_dir="DATA_DIR", **options)
    seen = []
    monkeypatch.setattr(
        "tdlrt_lab.cli.train.run", lambda config, *rest, **more: seen.append(config)
    )
    words = shlex.split(command(config))
    assert run_app(words[1:]) == 0
    assert seen == [config]
