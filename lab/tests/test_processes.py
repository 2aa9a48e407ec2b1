"""`torchrun ... -m tdlrt_lab train` is `tdlrt train` on several processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from integrations.processes import TORCHRUN
from tdlrt_lab.config import RunConfig
from tdlrt_lab.run.processes import processes, share
from tdlrt_lab.run.runner import Interrupted, Observer, run

OPTIONS = {"epochs": 2, "train_images": 202, "batch_size": 67, "integrator": "bug", "rank": 0.2}


def torchrun(out, *more):
    return subprocess.run(command(out, *more), capture_output=True, text=True, check=False)


def command(out, *more):
    words = [*TORCHRUN, "--log-dir", out.parent]
    options = [w for k, v in OPTIONS.items() for w in (f"--{k.replace('_', '-')}", v)]
    words += ["-m", "tdlrt_lab", "train", "lenet5", "--data", "digits", "--device", "cpu"]
    words += [*options, "--out", out, *more]
    return [*map(str, words)]


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Stop(Observer):
    """Ctrl-C, by default in the middle of the second epoch."""

    def __init__(self, step=6):
        self.step = step
        self.begins_at = None

    def started(self, training, data):
        self.begins_at = training.step

    def stepped(self, training):
        if training.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    """The last batch of each epoch has a single image, for one process alone."""
    done = torchrun(tmp_path / "two", "--json")
    assert done.returncode == 0, done.stderr
    # Gloo of some versions of torch greets on the same stream.
    lines_of_json = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]
    printed = [json.loads(line) for line in lines_of_json]
    assert len(printed) == 3
    run(RunConfig(model="lenet5", data="digits", device="cpu", **OPTIONS), tmp_path / "one")
    files = [{path.name for path in (tmp_path / name).rglob("*")} for name in ("one", "two")]
    assert files[0] == files[1]
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for key in ("train_accuracy", "test_accuracy", "ranks", "lr"):
            assert one[key] == two[key]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_stopped(tmp_path):
    config = RunConfig(model="lenet5", data="digits", device="cpu", **OPTIONS)
    run(config, tmp_path / "whole")
    with pytest.raises(Interrupted, match="after step 6 of 8"):
        run(config, tmp_path / "stopped", observer=Stop())
    done = torchrun(tmp_path / "stopped", "--resume", "--quiet")
    assert done.returncode == 0, done.stderr
    whole, resumed = lines(tmp_path / "whole")[1], lines(tmp_path / "stopped")[1]
    assert whole["train_accuracy"] == resumed["train_accuracy"]
    assert whole["loss"] == pytest.approx(resumed["loss"], rel=1e-4)


def until(holds, seconds=180):
    """Wait, and give what it gave."""
    for _ in range(10 * seconds):
        if found := holds():
            return found
        time.sleep(0.1)
    raise AssertionError("it never held")


def workers(launcher):
    """Processes that torchrun started, by their number (Linux)."""
    children = f"/proc/{launcher}/task/{launcher}/children"
    with open(children) as file:
        processes = file.read().split()
    found = {}
    for process in processes:
        with open(f"/proc/{process}/environ", "rb") as file:
            variables = dict(word.partition(b"=")[::2] for word in file.read().split(b"\0"))
        if b"RANK" in variables:
            found[int(variables[b"RANK"])] = int(process)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_process_goes_on_where_a_worker_of_two_was_lost(tmp_path):
    out, whole = tmp_path / "lost", tmp_path / "whole"
    config = RunConfig(model="lenet5", data="digits", device="cpu", **OPTIONS | {"epochs": 100})
    words = command(out, "--epochs", 100, "--checkpoint-steps", 3, "--quiet")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as launcher:
        until(lambda: any(out.glob("checkpoints/last.pt")))
        os.kill(workers(launcher.pid)[1], signal.SIGKILL)
        _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert "Signal 9 (SIGKILL) received" in errors
    stored = torch.load(out / "checkpoints" / "last.pt", weights_only=True)
    stored = 4 * stored["epoch"] + stored["batch"]
    observer = Stop(stored + 8)
    with pytest.raises(Interrupted):
        run(config, out, resume=True, observer=observer)
    assert observer.begins_at == stored
    with pytest.raises(Interrupted):
        run(config, whole, observer=Stop(stored + 8))
    for one, two in zip(lines(out), lines(whole), strict=True):
        assert one["ranks"] == two["ranks"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)


NOT_A_NUMBER = """
import os, sys
import torch
from tdlrt_lab.config import RunConfig
from tdlrt_lab.run.batches import ImageBatches
from tdlrt_lab.run.runner import run

batch, steps = ImageBatches.batch, iter(range(100))

def broken(self, index, moves=None):
    images, labels = batch(self, index, moves)
    return images * (torch.nan if next(steps) == 1 and os.environ["RANK"] == "1" else 1), labels

ImageBatches.batch = broken
options = {"model": "lenet5", "data": "digits", "epochs": 1, "batch_size": 256, "device": "cpu"}
summary = run(RunConfig(**options, skip_nonfinite=1), sys.argv[1])
print("skipped", summary["skipped_steps"])
"""


@pytest.mark.slow
def test_all_processes_skip_what_is_not_finite_on_one(tmp_path):
    (tmp_path / "script.py").write_text(NOT_A_NUMBER)
    words = [*TORCHRUN, "--log-dir", tmp_path, tmp_path / "script.py", tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("skipped 1") == 2


def test_shares_of_one_process_are_batches():
    batch = torch.arange(5)
    own, weight = share(batch)
    assert torch.equal(own, batch)
    assert weight == 1


@pytest.mark.parametrize("process", [0, 1, 2])
def test_every_image_counts_once(process, monkeypatch):
    monkeypatch.setattr("tdlrt_lab.run.processes.process_number", lambda: process)
    monkeypatch.setattr("tdlrt_lab.run.processes.process_count", lambda: 3)
    assert share(torch.arange(7))[0].tolist() == [[0, 3, 6], [1, 4], [2, 5]][process]
    assert share(torch.arange(7))[1] == pytest.approx([9 / 7, 6 / 7, 6 / 7][process])
    own, weight = share(torch.arange(2))
    assert (own.tolist(), weight) == [([0], 1.5), ([1], 1.5), ([0], 0.0)][process]


def test_without_torchrun_the_directory_is_the_run_s(tmp_path):
    with processes(RunConfig(model="lenet5", data="digits"), tmp_path, False) as place:
        assert place == tmp_path
