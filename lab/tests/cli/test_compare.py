import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from report_page.runs import write_directory
from tdlrt_lab.cli.display import SweepDisplay
from tdlrt_lab.cli.screens import LiveScreen
from tdlrt_lab.sweep.plan import Sweep

DIGITS = ["compare", "lenet5", "--data", "digits", "--set", "epochs=1", "--set", "batch_size=256"]
CONFIG = Path(__file__).parents[3] / "experiments" / "digits.yaml"


def runs_below(folder):
    return sorted(
        path.parent.relative_to(folder).as_posix() for path in folder.rglob("summary.json")
    )


def test_options_make_a_sweep_that_a_report_shows(tdlrt, tmp_path):
    words = ["--methods", "dense,tdlrt", "--budget", "0.2,0.3", "--seeds", "0,1", "--out", tmp_path]
    code, out, err = tdlrt(*DIGITS, *words)
    assert (code, err) == (0, "")
    assert runs_below(tmp_path) == [
        "dense/seed0",
        "dense/seed1",
        "tdlrt_budget=0.2/seed0",
        "tdlrt_budget=0.2/seed1",
        "tdlrt_budget=0.3/seed0",
        "tdlrt_budget=0.3/seed1",
    ]
    lines = out.splitlines()
    assert lines[0] == "[1/6] dense/seed0: started"
    assert re.match(r"\[1/6\] dense/seed0: accuracy [\d.]+ %, compression 0\.0 %, ", lines[1])
    assert any(re.match(r" tdlrt_budget=0\.2 +2/2 done", line) for line in lines)
    assert lines[-1].endswith(f"tdlrt report {tmp_path}")
    code, out, err = tdlrt("report", tmp_path)
    assert (code, err) == (0, "drawing lenet5 on digits\n")
    assert re.search(r"^\| tdlrt, budget 0\.2 \| .* \| 2 \|$", out, re.MULTILINE)
    assert out.splitlines()[-1] == f"page, tables and figures in {tmp_path / 'report'}"
    code, out, _ = tdlrt("report", tmp_path, "--json")
    rows = json.loads(out)["tables"]["lenet5 on digits"]
    assert [row["method"] for row in rows] == ["dense", "tdlrt, budget 0.3", "tdlrt, budget 0.2"]


def test_json_names_failures_and_the_exit_code_is_1(tdlrt, tmp_path):
    words = ["--methods", "dense,tdlrt", "--set", "dense.lr=1e20", "--out", tmp_path, "--json"]
    code, out, err = tdlrt(*DIGITS, *words)
    events = list(map(json.loads, out.splitlines()))
    assert code == 1
    assert err == "error: 1 of 2 runs failed: dense/seed0\n"
    assert events[-1] == {"event": "sweep", "runs": 2, "finished": 1, "failed": 1, "busy": 0}
    failed = next(event for event in events if event["event"] == "failed")
    assert failed["error"].startswith("step 2 of 6: the loss (nan)")
    _, out, _ = tdlrt("report", tmp_path)
    assert "dense/seed0: left out: failed: step 2 of 6: the loss" in out


def test_a_tolerance_and_a_budget_are_rows_of_the_methods_that_take_them(tdlrt, tmp_path):
    words = ["--methods", "dense,tdlrt,tucker", "--tau", "0.1", "--budget", "0.2"]
    assert tdlrt(*DIGITS, *words, "--out", tmp_path)[0] == 0
    rows = ["dense/seed0", "tdlrt-budget/seed0", "tdlrt-tau/seed0", "tucker/seed0"]
    assert runs_below(tmp_path) == rows
    config = json.loads((tmp_path / "tucker" / "seed0" / "summary.json").read_text())["config"]
    assert config["budget"] == 0.2


BAD = {
    "no data": (["compare", "lenet5"], "--data: missing; expected the name of a data set"),
    "method": ([*DIGITS, "--methods", "tdltr"], "unknown method 'tdltr'; did you mean tdlrt"),
    "model": (["compare", "lenet", "--data", "digits"], "unknown model 'lenet'"),
    "option": ([*DIGITS, "--set", "taau=1"], "options: unknown option 'taau'; did you mean tau"),
    "pair": ([*DIGITS, "--set", "epochs"], "--set epochs: expected OPTION=VALUES"),
    "other method": ([*DIGITS, "--set", "cp.lr=1"], "--set cp.: expected one of the methods tdlrt"),
    "range": (
        [*DIGITS, "--tau", "1.5"],
        "error: the command line: rows.tdlrt: tau 1.5: expected a tolerance",
    ),
    "type": ([*DIGITS, "--tau", "much"], "command line: rows.tdlrt.tau 'much': expected float"),
    "seeds": ([*DIGITS, "--seeds", "0,a"], "--seeds 0,a: expected different integers"),
    "device": ([*DIGITS, "--devices", "cuda:99"], "device 'cuda:99': not available"),
    "device and ray": (
        [*DIGITS, "--devices", "cpu", "--ray", "local"],
        "--devices cpu and --ray: expected one of them; Ray assigns the GPUs",
    ),
    "file": (["compare", "none.yaml"], "none.yaml: cannot be read as YAML"),
    "both": (["compare", CONFIG, "--tau", "0.1"], "--tau 0.1: expected only with a model"),
    "unused by the method": (
        [*DIGITS, "--methods", "dense,tdlrt", "--set", "dense.tau=0.1"],
        "--set dense.tau: not used by method dense; leave it out",
    ),
    "unused default": (
        [
            *DIGITS,
            "--methods",
            "tdlrt,tucker",
            "--budget",
            "0.2",
            "--set",
            "tucker.dense_until=0.6",
        ],
        "--set tucker.dense_until: not used by method tucker; leave it out",
    ),
    "unused by any method": (
        [*DIGITS, "--methods", "dense", "--set", "tau=0.1"],
        "--set tau: not used by any row; leave it out",
    ),
    "unused in a file": (
        ["compare", CONFIG, "--set", "dense_until=0.6"],
        "--set dense_until: not used by any row; leave it out",
    ),
    "method as an option": (
        [*DIGITS, "--set", "method=dense"],
        "--set method: every row sets its own method; leave it out",
    ),
    "method of a method": (
        [*DIGITS, "--set", "tdlrt.method=dense"],
        "--set tdlrt.method: not used by method tdlrt; leave it out",
    ),
    "unused size": (
        [*DIGITS, "--methods", "dense", "--tau", "0.1"],
        "--tau 0.1: not used with dense",
    ),
    "size twice": (
        [*DIGITS, "--set", "tdlrt.tau=0.1", "--tau", "0.2"],
        "--set tdlrt.tau and --tau: expected one of them",
    ),
    "row of a file": (["compare", CONFIG, "--set", "cp.lr=1"], "--set cp.: expected an option of"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_one_line_and_nothing_runs(tdlrt, tmp_path, words, message):
    code, out, err = tdlrt(*words, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.rglob("config.yaml"))


def test_a_directory_of_other_runs_is_refused(tdlrt, tmp_path):
    assert tdlrt(*DIGITS, "--out", tmp_path)[0] == 0
    code, _, err = tdlrt(*DIGITS, "--out", tmp_path, "--set", "momentum=0.5")
    assert code == 1
    assert "the run there has different options: momentum 0.9 (now 0.5)" in err


def test_a_report_of_runs_that_share_no_setting(tdlrt, tmp_path):
    for name, epochs, size in (("a", 1, 32), ("b", 5, 64)):
        write_directory(tmp_path, name, method="dense", epochs=epochs, batch_size=size)
    code, out, _ = tdlrt("report", tmp_path)
    assert (code, out.splitlines()[0]) == (0, "lenet5 on digits")


def test_a_report_of_nothing(tdlrt, tmp_path):
    code, out, err = tdlrt("report", tmp_path)
    assert (code, out) == (1, "")
    assert "no run directories" in err


def test_the_example_runs(tdlrt, tmp_path):
    words = ["--set", "epochs=1", "--set", "batch_size=256", "--seeds", "0", "--out", tmp_path]
    code, _, err = tdlrt("compare", CONFIG, *words)
    assert (code, err) == (0, "")
    assert len(runs_below(tmp_path)) == 6
    assert json.loads((tmp_path / "sweep.json").read_text())["title"] == "LeNet-5 on the digits"


def test_a_terminal_shows_one_table_that_is_kept_up_to_date():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
    shared = {"model": "lenet5", "data": "digits"}
    runs = Sweep(options=shared, rows={"a": {}, "b": {"tau": 0.2}}, seeds=(0, 1)).runs("out")
    numbers = {"accuracy": 90.0, "compression": 0.5, "seconds": 3.0}
    with LiveScreen(console) as screen:
        display = SweepDisplay(screen, runs)
        display.show({"event": "started", "run": "a/seed0", "epoch": 0, "epochs": 9})
        display.show({"event": "epoch", "run": "a/seed0", "epoch": 4, "epochs": 9})
        display.show({"event": "failed", "run": "b/seed0", "error": "no memory"})
        display.show({"event": "busy", "run": "b/seed1"})
        display.show({"event": "finished", "run": "a/seed1", **numbers})
        display.close("results there")
        assert display.failed == ["b/seed0"]
    written = console.file.getvalue()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert "1/2 done, epoch 4/9" in text
    assert "[2/4] b/seed0: failed: no memory" in text
    last = text[text.rindex("row ") :]
    assert re.search(r" a +1/2 done, epoch 4/9 +90\.00 +50\.0 +3\.0", last)
    assert re.search(r" b +0/2 done, 1 failed, 1 busy", last)
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h")  # the cursor is back


@pytest.mark.slow
def test_ctrl_c_says_how_to_continue_and_that_continues(tmp_path):
    words = ["compare", "lenet5", "--data", "digits", "--set", "epochs=200", "--out", tmp_path]
    program = [sys.executable, "-c", "from tdlrt_lab.cli import main; main()"]
    process = subprocess.Popen(
        [*program, *map(str, words), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if json.loads(line)["event"] == "epoch":
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate()
    assert process.returncode == 1, err
    assert err.startswith("error: tdlrt/seed0: interrupted after step ")
    assert err.splitlines()[-1].startswith("continue with: tdlrt compare lenet5 --data digits")
    assert "--resume" not in err
    assert (tmp_path / "tdlrt" / "seed0" / "checkpoints" / "last.pt").exists()
