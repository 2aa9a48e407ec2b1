import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tdlrt_lab.cli.commands import COMMANDS
from tdlrt_lab.run.signals import stop_requests

RUN = ["train", "lenet5", "--data", "digits", "--batch-size", "256", "--epochs", "2"]


def test_version_and_help(tdlrt):
    assert tdlrt("--version") == (0, "tdlrt 0.1.0\n", "")
    code, out, _ = tdlrt("train", "--help")
    assert code == 0
    for words in ("tdlrt train lenet5 --data digits", "20 for digits", "0.05 for tdlrt", "--tau"):
        assert words in " ".join(out.replace("│", " ").split())
    code, out, err = tdlrt()
    assert (code, err) == (2, "")
    assert "train" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_list_of_commands_has_the_first_sentence_of_each(tdlrt, command):
    _, out, _ = tdlrt(command, "--help")
    assert COMMANDS[command] in " ".join(out.split())
    _, out, _ = tdlrt("--help")
    assert f"{command} {COMMANDS[command]}" in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize("words", ["--help", "--version", ""])
def test_a_list_of_commands_does_not_wait_for_torch(words):
    program = f"""
import sys
sys.argv = ["tdlrt", *{words!r}.split()]
from tdlrt_lab.cli import main
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "False\n"
    assert done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example_and_its_defaults(tdlrt, command):
    code, out, err = tdlrt(command, "--help")
    assert (code, err) == (0, "")
    assert f"\n tdlrt {command}" in out.partition("Examples")[2]
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("tdlrt doc", "doctor"),
        ("tdlrt plan le", "lenet5"),
        ("tdlrt plan vgg16 --data dig", "digits"),
    ],
)
def test_completion(tdlrt, monkeypatch, words, completed):
    monkeypatch.setenv("_TDLRT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert tdlrt() == (0, f"{completed}\n", "")


def test_lines_in_a_pipe(tdlrt, tmp_path):
    code, out, err = tdlrt(*RUN, "--baseline", "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert lines[0].startswith("lenet5 (tdlrt) on digits: 1,437 training, 360 test images 1x8x8")
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == ["1/2", "2/2"] * 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for layer in summary["layers"]:
        row = next(line.split() for line in lines if line.split()[:1] == [layer["name"]])
        assert row[1] == "x".join(map(str, layer["shape"]))
        assert row[2] == ("x".join(map(str, layer["ranks"])) if layer["ranks"] else "dense")
        assert row[3] == f"{layer['parameters']:,}"
    closing = f"accuracy {summary['accuracy']:.2f} % (dense {summary['dense_accuracy']:.2f} %)"
    assert lines[-2].startswith(closing)
    assert lines[-1].endswith(str(tmp_path / "run"))
    assert summary["command"].startswith("tdlrt train lenet5 --data digits")


def test_json_is_all_there_is_on_stdout(tdlrt, tmp_path):
    code, out, err = tdlrt(*RUN, "--json", "--out", tmp_path / "run", "--method", "dense")
    assert (code, err) == (0, "")
    first, second, last = map(json.loads, out.splitlines())
    assert [first["event"], second["event"], last["event"]] == ["epoch", "epoch", "summary"]
    assert second["epoch"] == 2
    assert second["method"] == "dense"
    assert last["accuracy"] == second["test_accuracy"]


def test_checkpoints_are_kept_and_a_damaged_one_is_told_of(tdlrt, tmp_path):
    out, run = tmp_path / "run", [*RUN, "--checkpoint-steps", "4", "--keep", "3"]
    assert tdlrt(*run, "--quiet", "--out", out)[0] == 0
    last, older = (out / "checkpoints" / name for name in ("last.pt", "previous-1.pt"))
    assert older.with_name("previous-2.pt").exists()
    last.write_bytes(b"")
    (out / "summary.json").unlink()
    code, text, _ = tdlrt(*run, "--out", out, "--resume")
    assert code == 0
    assert f"\nwarning: {last}: not a readable checkpoint (" in "\n" + text
    assert "continuing after step 8 of 12" in text
    last.write_bytes(b"")
    (out / "summary.json").unlink()
    events = [
        json.loads(line) for line in tdlrt(*run, "--out", out, "--resume", "--json")[1].splitlines()
    ]
    assert [event["event"] for event in events] == ["warning", "epoch", "summary"]
    assert events[0]["message"].endswith("continuing from previous-2.pt")


def test_quiet_prints_nothing(tdlrt, tmp_path):
    assert tdlrt(*RUN, "--quiet", "--out", tmp_path / "run") == (0, "", "")
    assert (tmp_path / "run" / "summary.json").exists()


def test_options_reach_the_run(tdlrt, tmp_path):
    options = {"tau": 0.2, "rank": 7, "init_scale": 0.5, "seed": 4, "integrator": "bug"}
    options |= {
        "modes": "channels",
        "reshape": "fc1=20x25:50x2x2",
        "skip_nonfinite": 3,
        "core_steps": 2,
        "adapt_every": 3,
        "freeze_at": 0.25,
        "lr": 0.01,
        "momentum": 0.5,
    }
    words = [w for name, value in options.items() for w in (f"--{name.replace('_', '-')}", value)]
    assert tdlrt(*RUN, *words, "--quiet", "--out", tmp_path / "run")[0] == 0
    config = json.loads((tmp_path / "run" / "summary.json").read_text())["config"]
    assert {name: config[name] for name in options} == options
    assert (config["epochs"], config["batch_size"]) == (2, 256)


def test_options_of_the_comparison_reach_the_run(tdlrt, tmp_path):
    options = {"budget": 0.3, "ramp": "linear", "spare": 0.5, "optimizer": "adamw", "warmup": 0.25}
    options |= {"train_images": 600}
    words = [w for name, value in options.items() for w in (f"--{name.replace('_', '-')}", value)]
    words += ["--rank", "conv2=10x4x3x3,*=0.25"]
    assert tdlrt(*RUN, *words, "--quiet", "--out", tmp_path / "run")[0] == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    options |= {"tau": None, "rank": {"conv2": [10, 4, 3, 3], "*": 0.25}, "lr": 0.006}
    assert {name: summary["config"][name] for name in options} == options
    assert (summary["tau"], summary["budget"]) == (None, 0.3)
    assert tdlrt(*RUN, *words, "--quiet", "--out", tmp_path / "run", "--resume")[0] == 0


def test_default_directory(tdlrt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tdlrt(*RUN, "--quiet", "--method", "dense", "--seed", 3)[0] == 0
    assert (tmp_path / "runs" / "lenet5-digits-dense-3" / "summary.json").exists()


BAD_ARGUMENTS = {
    "tau": (["--tau", "1.0"], r"--tau 1.0: expected a tolerance in [0, 1)"),
    "rank": (["--rank", "0"], r"--rank 0: expected a share in (0, 1]"),
    "tau and budget": (
        ["--tau", "0.1", "--budget", "0.1"],
        r"--tau 0.1 and --budget 0.1: expected one of them",
    ),
    "budget": (["--budget", "0.001"], r"--budget: got 0.001, but the smallest possible budget is"),
    "rank of a layer": (["--rank", "conv1=0"], r"rank of conv1 0: expected a share"),
    "ranks of a layer": (["--rank", "conv1=3,3"], r"'3' has no layer; expected LAYER=RANK"),
    "layer of a rank": (["--rank", "conv9=3"], r"the pattern 'conv9' matches no layer"),
    "train-images": (["--train-images", "2000"], r"digits holds 1437 images"),
    "ramp": (["--ramp", "cube"], r"unknown ramp 'cube'; did you mean cubic?"),
    "rank word": (["--rank", "half"], r"rank 'half': expected a share"),
    "init-scale word": (["--init-scale", "big"], r"--init-scale 'big': expected a positive number"),
    "epochs": (["--epochs", "0"], r"epochs 0: expected at least 1 epoch"),
    "not a number": (["--epochs", "many"], r"Invalid value for '--epochs'"),
    "unknown option": (["--taau", "0.1"], "No such option"),
    "its name": (["--taau", "0.1"], "--taau"),
    "no method": (["--method", "tdltr"], r"unknown method 'tdltr'; did you mean tdlrt?"),
    "no data": (["--data", "mnis"], r"unknown data set 'mnis'; did you mean mnist"),
    "missing file": (["--data", "mnist", "--data-dir", "nowhere"], r"train.parquet: no such file"),
    "device": (["--device", "tpu"], r"device 'tpu': not available"),
    "both": (["--resume", "--overwrite"], r"--resume and --overwrite: expected one of them"),
    "steps": (["--checkpoint-steps", "0"], r"--checkpoint-steps 0: expected at least 1 step"),
    "minutes": (["--checkpoint-minutes", "-1"], r"--checkpoint-minutes -1.0: expected a positive"),
    "keep": (["--keep", "0"], r"--keep 0: expected at least 1 checkpoint"),
    "skip": (["--skip-nonfinite", "-1"], r"--skip-nonfinite -1: expected a number of steps"),
    "method": (
        ["--method", "dense", "--tau", "0.1"],
        r"--tau 0.1: not used with method dense, only with method tdlrt, matrix_dlrt",
    ),
    "integrator": (["--core-steps", "1"], r"--core-steps 1: not used with integrator parallel"),
    "other integrator": (
        ["--integrator", "bug", "--basis-every", "2"],
        r"--basis-every 2: not used with integrator bug",
    ),
    "optimizer": (
        ["--optimizer", "adam", "--momentum", "0.9"],
        r"--momentum 0.9: not used with optimizer adam, only with optimizer sgd",
    ),
    "optimizer of a budget": (
        ["--budget", "0.2", "--momentum", "0.5"],
        r"--momentum 0.5: not used with optimizer adam",
    ),
    "data": (["--data-dir", "nowhere"], r"--data-dir 'nowhere': not used with data digits"),
    "no search for ranks": (
        ["--freeze-at", "0", "--tau", "0.2"],
        r"--tau 0.2: not used with freeze_at 0, only with freeze_at above 0",
    ),
    "basis-every": (["--basis-every", "0"], r"--basis-every 0: expected at least 1 step"),
    "baseline of dense": (["--method", "dense", "--baseline"], r"the method is 'dense' already"),
}


@pytest.mark.parametrize(("words", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_one_line_and_exit_code_2(tdlrt, tmp_path, words, message):
    code, out, err = tdlrt(*RUN, "--out", tmp_path / "run", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_data_set_whose_packages_are_missing(tdlrt, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "tdlrt_lab.data.parquet", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = tdlrt("train", "lenet5", "--data", "mnist", "--out", tmp_path / "run")
    message = "error: the data set 'mnist' needs the package pyarrow, which is not installed; run: "
    assert done == (1, "", f"{message}pip install 'tdlrt[data]'\n")


def test_bench_measures_and_prints(tdlrt):
    words = ("bench", "lenet5", "--data", "digits", "--batch-size", "2", "--rounds", "1")
    code, out, err = tdlrt(*words, "--rank", "0.1", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [row["network"] for row in found["networks"]] == ["dense", "tucker"]
    assert [row["layer"] for row in found["layers"]] == ["conv1", "conv2", "fc1"]
    code, out, err = tdlrt(*words)
    assert (code, err) == (0, "")
    assert "inference (ms)" in out
    assert "of dense" in out
    code, out, err = tdlrt("bench", "lenet5", "--data", "digits", "--device", "cuda:99")
    assert (code, out) == (2, "")
    assert "device 'cuda:99': not available" in err


def test_missing_or_unknown_words(tdlrt):
    assert tdlrt("train", "lenet", "--data", "digits")[::2] == (
        2,
        "error: unknown model 'lenet'; did you mean lenet5 or alexnet? "
        "Known: lenet5, rescnn, vgg16, alexnet, resnet18, resnet18_imagenet, hf:resnet, "
        "hf:convnext, hf:vit, gpt\n",
    )
    code, _, err = tdlrt("train", "lenet5")
    assert (code, err) == (2, "error: Missing option '--data'. See --help.\n")
    code, _, err = tdlrt("trian")
    assert code == 2
    assert err.startswith("error: No such command 'trian'")


def test_failed_runs_have_exit_code_1(tdlrt, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = tdlrt(*RUN, "--out", tmp_path / "file")
    assert (code, err.count("\n")) == (1, 1)
    assert "cannot be written" in err
    code, _, err = tdlrt(*RUN, "--out", tmp_path)
    assert (code, "contains files, but not a run" in err) == (1, True)
    code, _, err = tdlrt(*RUN, "--lr", "1e20", "--out", tmp_path / "run")
    assert (code, "NaN or infinite" in err) == (1, True)


def test_debug_shows_the_traceback(tdlrt):
    code, _, err = tdlrt(*RUN, "--tau", "7", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: --tau 7.0: expected")


def test_a_second_interrupt_ends_quietly(tdlrt, monkeypatch):
    def interrupt(*arguments, **options):
        with stop_requests():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("tdlrt_lab.cli.train.run", interrupt)
    try:
        assert tdlrt(*RUN) == (130, "", "")
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_of_the_import_ends_quietly():
    program = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(name, *rest):
        if name == "torch":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder)
sys.argv = ["tdlrt", "train"]
from tdlrt_lab.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.slow
def test_ctrl_c_and_resume_in_fresh_processes_equal_one_run(tmp_path):
    command = [sys.executable, "-c", "from tdlrt_lab.cli import main; main()", *RUN, "--json"]
    command += ["--tau", "0.5", "--init-scale", "1.0", "--epochs", "8", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out, *more):
        return subprocess.Popen(
            [*command, str(tmp_path / out), *more],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    whole, part = start("whole"), start("part")
    part.stdout.readline()
    part.send_signal(signal.SIGINT)
    _, err = part.communicate()
    assert part.returncode == 1, err
    assert err.startswith("error: interrupted after step ")
    assert err.splitlines()[-1].startswith("continue with: tdlrt train lenet5 --data digits")
    assert err.endswith(" --resume\n")
    whole_out, err = whole.communicate()
    assert whole.returncode == 0, err
    resumed = start("part", "--resume")
    resumed_out, err = resumed.communicate()
    assert resumed.returncode == 0, err
    assert 1 < len(resumed_out.splitlines()) < len(whole_out.splitlines())
    assert _metrics(tmp_path / "part") == _metrics(tmp_path / "whole")
    weights = Path("checkpoints", "model.safetensors")
    assert (tmp_path / "part" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def _metrics(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{**line, "seconds": 0} for line in lines]


def test_it_is_a_module_too():
    words = [sys.executable, "-m", "tdlrt_lab", "--version"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "tdlrt 0.1.0\n", "")


def test_resuming_a_finished_run_says_so(tdlrt, tmp_path):
    assert tdlrt(*RUN, "--quiet", "--out", tmp_path / "run")[0] == 0
    code, out, _ = tdlrt(*RUN, "--resume", "--out", tmp_path / "run")
    assert code == 0
    assert "already finished; nothing to train" in out
    assert out.splitlines()[-2].startswith("accuracy ")


def test_plan_shows_the_path_of_every_layer(tdlrt):
    code, out, err = tdlrt("plan", "lenet5", "--data", "mnist", "--rank", "0.2")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    rows = {line.split()[0]: line.split() for line in out.splitlines() if "x" in line}
    assert rows["conv1"][1:4] == ["20x1x5x5", "4x1x5x5", "dense"]
    assert rows["conv2"][3] == "three_stage"
    assert rows.keys() == {"conv1", "conv2", "fc1"}


def test_plan_for_machines(tdlrt):
    words = ["plan", "vgg16", "--data", "cifar100", "--batch-size", "2", "--json"]
    code, out, _ = tdlrt(*words, "--rank", "conv1_2=full,conv5_3=0.1")
    assert code == 0
    plan = json.loads(out)
    assert (plan["model"], plan["data"], plan["batch_size"]) == ("vgg16", "cifar100", 2)
    first, last = plan["layers"]
    assert (first["layer"], first["input"]) == ("conv1_2", [2, 64, 32, 32])
    assert (last["shape"], last["ranks"]) == ([512, 512, 3, 3], [51, 51, 3, 3])
    assert last["training"]["path"] == last["inference"]["path"] == "three_stage"
    assert 0 < last["inference"]["of_dense"] < 1 <= first["inference"]["of_dense"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lenet", "--data", "mnist"], "unknown model 'lenet'"),
        (["lenet5", "--data", "mnis"], "unknown data set 'mnis'"),
        (["lenet5", "--data", "mnist", "--rank", "0"], "rank 0: expected a share"),
        (["lenet5", "--data", "mnist", "--rank", "conv9=3"], "matches no layer"),
        (["lenet5", "--data", "mnist", "--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["lenet5"], "Missing option '--data'"),
    ],
)
def test_bad_arguments_of_plan(tdlrt, words, message):
    code, out, err = tdlrt("plan", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err
