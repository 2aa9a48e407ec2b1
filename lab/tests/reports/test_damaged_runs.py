"""One damaged run is one line of a report; the others are reported."""

import json
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tdlrt.errors import RunError
from tdlrt_lab.reports.collect import collect
from tdlrt_lab.reports.stored import core_spectra
from tdlrt_lab.reports.values import LARGEST, plain_value, printable
from tdlrt_lab.reports.write import write_report
from tdlrt_lab.run.results import RunDirectory


def nested(depth):
    return "[" * depth + "]" * depth


def in_summary(key, text):
    """Replace a value of summary.json by the text of another one."""

    def change(directory):
        stored = json.loads(directory.summary.read_text())
        stored[key] = "VALUE"
        directory.summary.write_text(json.dumps(stored).replace('"VALUE"', text))

    return change


def in_config(key, text):
    """The same in config.yaml."""

    def change(directory):
        stored = {**directory.read_config(), key: "VALUE"}
        directory.config.write_text(json.dumps(stored).replace('"VALUE"', text))

    return change


def everywhere(key, value):
    """Replace a value of both."""

    def change(directory):
        in_config(key, json.dumps(value))(directory)
        in_summary(key, json.dumps(value))(directory)

    return change


LEFT_OUT = {
    "huge integer": (in_summary("accuracy", "9" * 4000), "summary.json: accuracy is 9999"),
    "integer too long": (in_summary("accuracy", "9" * 5000), "cannot read the result"),
    "huge number": (in_summary("seconds", "1e300"), "summary.json: a number beyond 64 bits"),
    "deep nesting": (in_summary("command", nested(90)), "summary.json: more than 20 levels"),
    "very deep nesting": (in_summary("command", nested(100_000)), "left out"),
    "name in Unicode alone": (everywhere("method", "\0a"), "a name that begins with a letter"),
    "hidden name": (everywhere("model", "_a"), "a name that begins with a letter"),
    "name of another type": (everywhere("data", [1]), "data is [1]; expected a name"),
    "seed of another type": (everywhere("seed", "one"), "expected an integer from 0"),
    "keys of many types": (in_config("rank", "{1: 2, null: 3, 2020-01-01: 4}"), ""),
    "ranks that no layer has": (in_config("rank", '{"a": {"b": [{}]}}'), ""),
    "lone surrogate": (in_summary("command", r'"\ud800"'), ""),
    "NUL": (in_summary("command", r'"a\u0000b"'), ""),
    "infinite option": (in_config("lr", ".inf"), ""),
    "layer without name": (in_summary("layers", "[1]"), ""),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_a_damaged_run_ends_no_report(write_run, tmp_path, kind):
    change, reason = LEFT_OUT[kind]
    for number in (1, 2):
        write_run(f"good{number}", method="dense", lr=number / 100)
    change(write_run("bad", compression=0.5, lr=0.5))
    report = write_report(tmp_path)
    text = {one.path: one.text for one in report.problems}.get("bad", "")
    assert reason in text and len(text) <= 500 and text.isprintable()
    assert "good1" not in text
    for name in ("index.html", "tables.md", "tables.tex"):
        assert (report.folder / name).read_text()
    runs = [run.path for run in collect(tmp_path)[0]]
    assert {"good1", "good2"} <= set(runs)
    assert not reason or "bad" not in runs


def test_errors_that_nobody_foresaw_are_problems_of_one_run(write_run, tmp_path, monkeypatch):
    write_run("good", method="dense")
    write_run("bad", method="dense", seed=1)
    read = RunDirectory.read_summary

    def read_or_fail(directory):
        return 1 / 0 if directory.path.name == "bad" else read(directory)

    monkeypatch.setattr(RunDirectory, "read_summary", read_or_fail)
    runs, (problem,) = collect(tmp_path)
    assert [run.path for run in runs] == ["good"]
    assert problem.text == "left out: ZeroDivisionError: division by zero"


def metrics(**changes):
    def change(directory):
        first, *others = directory.read_metrics()
        directory.write_metrics([replace(first, **changes), *others])

    return change


CORES = {
    "NaN": torch.full((3, 2), torch.nan),
    "infinite": torch.tensor([[1.0, torch.inf]]),
    "integers": torch.ones(3, 2, dtype=torch.int8),
    "half precision": torch.ones(3, 2, dtype=torch.bfloat16),
    "zero": torch.zeros(3, 2),
    "no values": torch.zeros(0, 4),
    "no dimensions": torch.tensor(1.0),
    "many dimensions": torch.ones(1, 1, 1, 1, 1, 1),
    "30000 x 1": torch.ones(30_000, 1),
    "complex": torch.ones(3, 2, dtype=torch.complex64),
}


def core(name):
    return lambda directory: save_file({"a.core": CORES[name]}, directory.model)


KEPT = {
    "ranks of unequal length": (
        metrics(ranks={"conv2": [1], "fc1": [5, 5]}),
        "metrics.jsonl cannot be read (epoch 2: conv2 has ranks of another number)",
    ),
    "change of ranks of unequal length": (
        metrics(steps=4, rank_changes=[[0, {"conv2": [1], "fc1": [5, 5]}]]),
        "metrics.jsonl cannot be read (epoch 1: conv2 has ranks of another number)",
    ),
    "changes of ranks at odd places": (
        metrics(steps=2**62, rank_changes=[[1, {"none": []}], [2**62, {"\ud800": [2**40]}]]),
        "",
    ),
    "ranks of an unknown kind": (metrics(ranks={"a": [1, 2, 3, 4, 5, 6]}), ""),
    "huge epoch": (metrics(loss=10**400), "(a number beyond 64 bits)"),
    "NaN epoch": (metrics(loss=float("nan")), "epoch 1: loss nan"),
    "surrogate in the name of a layer": (metrics(ranks={"\ud800$\\frac{$": [1, 2]}), ""),
    "core: NaN": (core("NaN"), "no singular values: a.core has NaN or infinite values"),
    "core: infinite": (core("infinite"), "no singular values: a.core has NaN or infinite values"),
    **{f"core: {name}": (core(name), "") for name in list(CORES)[2:]},
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_run_with_damaged_curves_or_cores_is_reported(write_run, tmp_path, kind):
    change, reason = KEPT[kind]
    write_run("good", method="dense")
    change(write_run("bad", compression=0.5, lr=0.5))
    started = time.process_time()
    report = write_report(tmp_path)
    assert time.process_time() - started < 20
    assert reason in " ".join(one.text for one in report.problems if one.path == "bad")
    assert {one.path for one in report.problems} <= {"bad"}
    assert [len(group.runs) for group in report.sections[0].groups] == [1, 1]


def test_a_column_has_the_spectrum_of_a_number(write_run, tmp_path):
    directory = write_run("a", compression=0.5)
    core("30000 x 1")(directory)
    (run,), _ = collect(tmp_path)
    assert core_spectra(run) == {"a": [[1.0], [1.0]]}


@pytest.mark.slow
def test_a_network_of_3000_layers_is_drawn_in_part(write_run, tmp_path):
    directory = write_run("a", compression=0.5)
    save_file({f"l{n}.core": torch.eye(3) for n in range(3000)}, directory.model)
    lines = directory.read_metrics()
    ranks = [{f"l{n}": [3, 1 + k] for n in range(3000)} for k in range(len(lines))]
    directory.write_metrics([replace(m, ranks=r) for m, r in zip(lines, ranks, strict=True)])
    started = time.process_time()
    report = write_report(tmp_path)
    assert time.process_time() - started < 60
    assert not report.problems
    for name in ("ranks-1", "spectra-1"):
        drawn = (report.folder / "figures" / f"lenet5-digits-{name}.svg").read_text()
        assert "(the first 24 of 3,000 layers)" in drawn


@pytest.mark.parametrize("text", ["[", nested(100_000), '{"title": 1, "note": "\\ud800\\u0000"}'])
def test_any_description_makes_a_title(write_run, tmp_path, text):
    write_run("a", method="dense")
    (tmp_path / "sweep.json").write_text(text)
    assert "<title>" in (write_report(tmp_path).folder / "index.html").read_text()


def test_values_as_a_report_shows_them():
    assert printable("a\u2028b\tc\x07\ud800ä") == "a b c\\x07\\ud800ä"
    nan = float("nan")
    value = {1: [None, True, 1.5, "\n"], "\0": {"a": nan}}
    plain = plain_value(value)
    assert plain == {"1": [None, True, 1.5, ""], "\\x00": {"a": plain["\\x00"]["a"]}}
    assert plain_value([float("inf"), -(2**62)]) == [float("inf"), -(2**62)]
    for wrong in (2**63, -1e19, LARGEST, [[2**70]]):
        with pytest.raises(RunError, match="a number beyond 64 bits"):
            plain_value(wrong)
    with pytest.raises(RunError, match="more than 1,000,000 values"):
        plain_value([0] * 1_000_000)
