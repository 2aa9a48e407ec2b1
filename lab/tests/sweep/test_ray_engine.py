import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tdlrt.errors import MissingExtraError, RunError
from tdlrt_lab.run.environment import versions
from tdlrt_lab.sweep import ray_engine
from tdlrt_lab.sweep.execute import execute
from tdlrt_lab.sweep.plan import Sweep, SweepError
from tdlrt_lab.sweep.ray_engine import execute_on_ray

SHARED = {"model": "lenet5", "data": "digits", "epochs": 20, "batch_size": 256}
ROWS = {"dense": {"method": "dense"}, "tdlrt": {"budget": 0.2}}
WORDS = ["compare", "lenet5", "--data", "digits", "--methods", "dense,tdlrt", "--budget", "0.2"]
WORDS += ["--set", "epochs=20", "--set", "batch_size=256", "--ray", "local", "--jobs", "2"]


def run_of(**options):
    (run,) = Sweep(options=SHARED, rows={"a": options}).runs("out")
    return run


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    expected = r"--ray needs the package ray, .*run: pip install 'tdlrt-lab\[ray\]'"
    with pytest.raises(MissingExtraError, match=expected):
        execute_on_ray([run_of()], print, "local")


@pytest.mark.parametrize(
    ("machines", "jobs", "share"),
    [
        ([{"CPU": 8.0}, {"CPU": 6.0}], None, {"num_cpus": 6}),
        ([{"CPU": 8.0}, {"CPU": 6.0}], 4, {"num_cpus": 1}),
        ([{"CPU": 2.0}], 5, {"num_cpus": 1 / 3}),
        ([{"CPU": 2.0}, {"CPU": 16.0, "GPU": 4.0}], None, {"num_cpus": 4, "num_gpus": 1}),
        ([{"CPU": 2.0}, {"CPU": 16.0, "GPU": 4.0}], 2, {"num_cpus": 8, "num_gpus": 1}),
        ([{"CPU": 16.0, "GPU": 2.0}], 8, {"num_cpus": 2, "num_gpus": 0.25}),
    ],
)
def test_runs_share_a_machine(machines, jobs, share):
    assert ray_engine._share(run_of(), machines, jobs) == share


def test_a_run_on_processors_takes_no_gpu():
    machines = [{"CPU": 2.0}, {"CPU": 16.0, "GPU": 4.0}]
    assert ray_engine._share(run_of(device="cpu"), machines, 2) == {"num_cpus": 1}


def test_an_address_where_nobody_answers_is_refused():
    expected = r"--ray ray://127\.0\.0\.1:1: .*refused.*; expected 'local', 'auto' on"
    with (
        pytest.raises(SweepError, match=expected),
        ray_engine._connection(None, "ray://127.0.0.1:1"),
    ):
        pass


def test_a_machine_must_see_the_folder_and_have_this_version(tmp_path):
    with ray_engine._token(tmp_path / "out") as token:
        ray_engine._check_machine(token, versions()["tdlrt"])
        with pytest.raises(
            RunError, match=r"has tdlrt .*, expected 9\.9; install that version there"
        ):
            ray_engine._check_machine(token, "9.9")
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(RunError, match=r"out: machine .* does not see this folder, or sees a d"):
        ray_engine._check_machine(token, versions()["tdlrt"])


def test_a_run_is_sent_with_whole_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sent = ray_engine._portable(run_of(data_dir="sets"))
    assert (sent.out, sent.config.data_dir) == (tmp_path / "out", str(tmp_path / "sets"))
    assert ray_engine._portable(run_of()).config == run_of().config


@pytest.fixture
def start():
    """Start the sweep in a process of its own; it ends with the test at the latest."""
    pytest.importorskip("ray")
    processes = []

    def popen(out):
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tdlrt_lab", *WORDS, "--out", str(out), "--json"],
                env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield popen
    for process in processes:
        process.kill()
        process.communicate()


def worker_of(driver, run):
    """The process of Ray that does a run of a sweep."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
    lines = [line.split(maxsplit=2) for line in listed.splitlines()[1:]]
    parents = {int(pid): int(parent) for pid, parent, _ in lines}
    (worker,) = [
        int(pid)
        for pid, raylet, title in lines
        if title.startswith(f"ray::{run}") and parents.get(int(raylet)) == driver
    ]
    return worker


def of_run(events, run):
    return [event for event in events if event["run"] == run]


@pytest.mark.slow
def test_a_killed_worker_leaves_no_trace(tmp_path, start, script):
    """Two runs on a local cluster at a time, one of them killed in the middle."""
    same = script("kills")
    process, events = start(tmp_path / "ray"), []
    for event in map(json.loads, process.stdout):
        if event["event"] == "sweep":
            break
        events.append(event)
        if event["event"] == "epoch" and of_run(events, "tdlrt/seed0")[1:] == [event]:
            os.kill(worker_of(process.pid, "tdlrt/seed0"), signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == 0, err
    starts = [e["epoch"] for e in of_run(events, "tdlrt/seed0") if e["event"] == "started"]
    assert len(starts) == 2 and starts[0] == 0 < starts[1]
    assert [e["event"] for e in of_run(events, "dense/seed0")].count("started") == 1

    there = Sweep(options=SHARED, rows=ROWS).runs(tmp_path / "ray")
    here = Sweep(options=SHARED, rows=ROWS).runs(tmp_path / "here")
    execute(here, lambda event: None)
    for one, other in zip(there, here, strict=True):
        assert same.metrics(one.directory) == same.metrics(other.directory)
        assert same.contents(one.directory.model) == same.contents(other.directory.model)
        assert same.summary(one.directory) == same.summary(other.directory)
    assert not list((tmp_path / "ray").glob(".*"))


@pytest.mark.slow
def test_ctrl_c_stores_what_was_trained(tmp_path, start):
    process = start(tmp_path)
    for event in map(json.loads, process.stdout):
        if event["event"] == "epoch":
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate()
    assert process.returncode == 1
    assert "error: interrupted; what was trained so far is stored\ncontinue with: " in err
    run = Path(tmp_path, event["run"])
    assert (run / "checkpoints" / "last.pt").exists()
    assert not list(tmp_path.rglob("*.error.json"))
    assert not list(tmp_path.rglob("summary.json"))
