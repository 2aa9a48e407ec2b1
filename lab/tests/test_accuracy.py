import json
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest

from tdlrt_lab.cli.app import run_app
from tdlrt_lab.config import RunConfig
from tdlrt_lab.run.runner import Interrupted

OPTIONS = {"model": "lenet5", "data": "digits", "epochs": 1, "batch_size": 256}


@pytest.fixture
def accuracy(script, monkeypatch, tmp_path):
    """The script, with two rows on the digits and a place of its own for the results."""
    module = script("accuracy")
    rows = {"dense": {"method": "dense"}, "budget_0.2": {"budget": 0.2}}
    digits = script("comparisons").Experiment(
        subject="", note="", options=OPTIONS, rows=rows, seeds=(0, 1)
    )
    monkeypatch.setattr(module, "EXPERIMENTS", {"digits": digits})
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


@pytest.fixture
def start(accuracy, tmp_path, capsys):
    """Run the script; gives its lines and the names of the results that are there afterwards."""

    def call(*words):
        accuracy.main([*words, "--runs", str(tmp_path / "runs")])
        results = sorted(path.stem for path in (tmp_path / "results").rglob("*.json"))
        return capsys.readouterr().out.splitlines(), results

    return call


def test_a_result_per_row_and_seed_once(start, tmp_path):
    everything = ["budget_0.2_seed0", "budget_0.2_seed1", "dense_seed0", "dense_seed1"]
    assert start("--only", "dense", "--seeds", "0")[1] == ["dense_seed0"]
    lines, results = start()
    assert results == everything
    assert [line for line in lines if line.endswith("done before")] == [
        "digits/dense_seed0: done before"
    ]
    lines, results = start()
    assert len(lines) == 4 and all(line.endswith("done before") for line in lines)
    result = json.loads((tmp_path / "results" / "digits" / "budget_0.2_seed1.json").read_text())
    assert (result["seed"], result["budget"]) == (1, 0.2)
    assert result["command"] == (
        "tdlrt train lenet5 --data digits --budget 0.2 --epochs 1 --batch-size 256 --seed 1"
    )


def test_a_failed_run_does_not_stop_the_others(start, accuracy, monkeypatch, capsys):
    digits = accuracy.EXPERIMENTS["digits"]
    rows = {"dense": {"method": "dense", "lr": 1e20}, "budget_0.2": {"budget": 0.2}}
    monkeypatch.setitem(accuracy.EXPERIMENTS, "digits", replace(digits, rows=rows, seeds=(0,)))
    with pytest.raises(SystemExit, match=r"1 of 2 runs failed: digits/dense_seed0"):
        start()
    assert (
        "digits/dense_seed0: failed: step 2 of 6: the loss (nan) or a gradient is NaN"
        in capsys.readouterr().err
    )
    assert start("--only", "budget_*")[1] == ["budget_0.2_seed0"]


def test_an_interrupted_run_is_resumed(start, accuracy, monkeypatch):
    real, calls = accuracy.run, []

    def interrupted(config, directory, *, resume, **options):
        calls.append(resume)
        real(config, directory, resume=resume, **options)
        (directory / "summary.json").unlink()
        raise Interrupted("interrupted after step 3 of 6")

    def resumed(config, directory, *, resume, **options):
        calls.append(resume)
        return real(config, directory, resume=resume, **options)

    words = ("--only", "dense", "--seeds", "0")
    monkeypatch.setattr(accuracy, "run", interrupted)
    with pytest.raises(SystemExit, match=r"error: interrupted after step 3"):
        start(*words)
    monkeypatch.setattr(accuracy, "run", resumed)
    assert start(*words)[1] == ["dense_seed0"]
    assert calls == [False, True]


def test_a_run_of_another_process_is_left_to_it(start, accuracy, tmp_path):
    lock = tmp_path / "runs" / "digits" / "dense_seed0.lock"
    with accuracy.exclusive(lock) as mine:
        assert mine
        lines, results = start("--seeds", "0")
    assert lines[0] == "digits/dense_seed0: another process is at it"
    assert results == ["budget_0.2_seed0"]
    assert start("--seeds", "0")[1] == ["budget_0.2_seed0", "dense_seed0"]


def test_the_lock_of_a_killed_process_is_open(accuracy, tmp_path):
    code = (
        "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); "
        "lock.acquire(); print('locked', flush=True); time.sleep(60)"
    )
    lock = tmp_path / "row.lock"
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        with accuracy.exclusive(lock) as mine:
            assert not mine
        process.kill()
    with accuracy.exclusive(lock) as mine:
        assert mine


def test_a_result_with_other_options_is_not_taken_for_the_row(start, accuracy, monkeypatch):
    start("--only", "dense", "--seeds", "0")
    digits = accuracy.EXPERIMENTS["digits"]
    changed = replace(digits, options={**OPTIONS, "epochs": 2})
    monkeypatch.setitem(accuracy.EXPERIMENTS, "digits", changed)
    with pytest.raises(SystemExit, match=r"dense_seed0\.json: its run had another epochs than"):
        start()


def test_unknown_names(start):
    with pytest.raises(SystemExit, match=r"--only tense: fits no row; .* digits/dense, digits/bud"):
        start("--only", "dense", "tense")


COMMANDS = [
    {"method": "dense", "optimizer": "adam"},
    {"tau": 0.1},
    {"budget": 0.05, "ramp": "cubic", "spare": 0.25, "optimizer": "adamw", "warmup": 0.1},
    {"method": "tucker", "rank": {"conv?": [3, 1, 5, 5], "*": 0.5}, "lr": 0.05, "seed": 3},
    {"rank": "full", "init_scale": 0.3, "integrator": "bug", "core_steps": 4, "device": "cpu"},
    {"train_images": 500, "weight_decay": 5e-4, "momentum": 0.0, "freeze_at": 1.0, "lr": 1e-5},
]


@pytest.mark.parametrize("options", COMMANDS, ids=str)
def test_the_stored_command_does_the_run(accuracy, monkeypatch, options):
    config = RunConfig(model="lenet5", data="mnist", data_dir="DATA_DIR", **options)
    seen = []
    monkeypatch.setattr("tdlrt_lab.cli.app.run", lambda config, *rest, **more: seen.append(config))
    words = shlex.split(accuracy.command(config))
    assert run_app(words[1:]) == 0
    assert seen == [config]


def test_the_commands_of_the_experiments(accuracy, script, monkeypatch, start):
    monkeypatch.setattr(accuracy, "EXPERIMENTS", script("comparisons").EXPERIMENTS)
    lines, results = start("--dry-run", "--data-dir", "somewhere", "--seeds", "0", "7")
    assert results == []
    assert all(line.startswith("tdlrt train ") and "DATA_DIR" in line for line in lines)
    # Two tables may show the same run; within one the rows differ.
    for name, experiment in accuracy.EXPERIMENTS.items():
        configs = {str(experiment.config(row, 0)) for row in experiment.rows}
        assert len(configs) == len(experiment.rows), name
