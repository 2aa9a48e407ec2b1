"""`torchrun ... -m tdlrt train` is `tdlrt train` on several processes."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from tdlrt.experiments.config import RunConfig
from tdlrt.experiments.processes import processes, share
from tdlrt.experiments.runner import Interrupted, Observer, run

OPTIONS = {"epochs": 2, "train_images": 202, "batch_size": 67, "integrator": "bug", "rank": 0.2}


def torchrun(out, *more):
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--log-dir", out.parent]
    options = [w for k, v in OPTIONS.items() for w in (f"--{k.replace('_', '-')}", v)]
    words += ["-m", "tdlrt", "train", "lenet5", "--data", "digits", "--device", "cpu"]
    words += [*options, "--out", out, *more]
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Stop(Observer):
    """Ctrl-C in the middle of the second epoch."""

    def stepped(self, training):
        if training.step == 6:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    """The last batch of each epoch has a single image, for one process alone."""
    done = torchrun(tmp_path / "two", "--json")
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
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


def test_shares_of_one_process_are_batches():
    batch = torch.arange(5)
    own, weight = share(batch)
    assert torch.equal(own, batch)
    assert weight == 1


@pytest.mark.parametrize("process", [0, 1, 2])
def test_every_image_counts_once(process, monkeypatch):
    monkeypatch.setattr("tdlrt.experiments.processes.process_number", lambda: process)
    monkeypatch.setattr("tdlrt.experiments.processes.process_count", lambda: 3)
    assert share(torch.arange(7))[0].tolist() == [[0, 3, 6], [1, 4], [2, 5]][process]
    assert share(torch.arange(7))[1] == pytest.approx([9 / 7, 6 / 7, 6 / 7][process])
    own, weight = share(torch.arange(2))
    assert (own.tolist(), weight) == [([0], 1.5), ([1], 1.5), ([0], 0.0)][process]


def test_without_torchrun_the_directory_is_the_run_s(tmp_path):
    with processes(RunConfig(model="lenet5", data="digits"), tmp_path, False) as place:
        assert place == tmp_path
