import json
from pathlib import Path

import pytest

from report_page.runs import write_directory
from tdlrt.errors import DataError, RunError
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import load_data
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.sweep.checks import check_data, check_directories, describe
from tdlrt_lab.sweep.plan import Sweep, SweepError, read_sweep

CONFIGS = sorted((Path(__file__).parents[3] / "experiments").glob("*.yaml"))

SHARED = {"model": "lenet5", "data": "digits"}


@pytest.fixture
def write(tmp_path):
    """Write a sweep file; gives its path."""

    def to_file(text):
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        return path

    return to_file


def names(sweep):
    return [run.name for run in sweep.runs("out")]


def test_lists_are_grids_and_rows_of_a_seed_come_first():
    sweep = Sweep(
        options={**SHARED, "tau": [0.1, 0.2]},
        rows={"a": {"lr": [0.01, 0.1]}, "b": {"tau": 0.3}},
        seeds=(0, 5),
    )
    rows = ["a_tau=0.1_lr=0.01", "a_tau=0.1_lr=0.1", "a_tau=0.2_lr=0.01", "a_tau=0.2_lr=0.1", "b"]
    assert names(sweep) == [f"{row}/seed{seed}" for seed in (0, 5) for row in rows]
    run = sweep.runs("out")[1]
    assert run.config == RunConfig(**SHARED, tau=0.1, lr=0.1, seed=0)
    assert run.directory.path == Path("out/a_tau=0.1_lr=0.1/seed0")
    assert run.lock.name == "seed0.lock"
    assert run.failure.name == "seed0.error.json"


def test_values_that_are_no_word_have_a_number_in_the_name():
    ranks = [{"conv1": [3, 1, 5, 5], "*": 0.5}, "full"]
    sweep = Sweep(options=SHARED, rows={"a": {"rank": ranks}})
    assert names(sweep) == ["a_rank=choice1/seed0", "a_rank=full/seed0"]


def test_a_file_is_read(write):
    path = write("""
title: A title
note: A note
seeds: [3]
options: {model: lenet5, data: digits, epochs: 2, weight_decay: 5e-4}
rows:
  dense: {method: dense}
  tdlrt:
""")
    sweep = read_sweep(path, {"epochs": 1, "seeds": (1, 2)})
    assert (sweep.title, sweep.note, sweep.seeds) == ("A title", "A note", (1, 2))
    dense, tdlrt, *others = sweep.runs("out")
    assert dense.config == RunConfig(**SHARED, epochs=1, weight_decay=5e-4, method="dense", seed=1)
    assert tdlrt.config.method == "tdlrt"
    assert len(others) == 2
    assert read_sweep(path).seeds == (3,)


ROWS = "options: {model: lenet5, data: digits}\nrows:\n"
BROKEN = {
    "no yaml": ("rows: [", r"sweep\.yaml: cannot be read as YAML"),
    "a list": ("- a", r"sweep\.yaml: got \['a'\], expected a mapping of names"),
    "unknown key": ("rowz: {}\n" + ROWS, r"sweep\.yaml: unknown key 'rowz'; did you mean rows"),
    "no rows": ("options: {}", r"sweep\.yaml: rows: got None, expected a mapping"),
    "empty rows": ("rows: {}", r"sweep\.yaml: rows: expected at least one row"),
    "options": ("options: 3\nrows: {a: }", r"sweep\.yaml: options: got 3, expected a mapping"),
    "row": (ROWS + "  a: 3", r"sweep\.yaml: rows\.a: got 3, expected a mapping"),
    "twice": (ROWS + "  a: {tau: 0.1}\n  a: {tau: 0.2}", r"duplicate key a.*line 4"),
    "row name": (
        ROWS + "  a/b: {}",
        r"sweep\.yaml: rows: got the name 'a/b'; expected at most 100 letters",
    ),
    "report": (ROWS + "  report: {}", r"rows: got the name 'report'; .* and not 'report'"),
    "option": (ROWS + "  a: {taau: 1}", r"rows\.a: unknown option 'taau'; did you mean tau"),
    "shared": ("options: {modle: x}\nrows: {a: }", r"options: unknown option 'modle'"),
    "seed": (ROWS + "  a: {seed: 1}", r"rows\.a\.seed: a seed cannot be an option"),
    "missing": ("options: {model: lenet5}\nrows: {a: }", r"rows\.a: no data; add it there"),
    "method": (ROWS + "  a: {method: tdltr}", r"rows\.a: unknown method 'tdltr'; did you mean"),
    "range": (ROWS + "  a: {tau: [0.1, 1.5]}", r"rows\.a: tau 1\.5: expected a tolerance"),
    "word": (ROWS + "  a: {epochs: many}", r"rows\.a\.epochs 'many': expected int"),
    "fraction": (ROWS + "  a: {epochs: 1.5}", r"rows\.a\.epochs 1\.5: expected int"),
    "yes": (ROWS + "  a: {tau: yes}", r"rows\.a\.tau True: expected float"),
    "none": (ROWS + "  a: {warmup: }", r"rows\.a\.warmup None: expected float"),
    "empty": (ROWS + "  a: {tau: []}", r"rows\.a\.tau \[\]: expected at least one value"),
    "same": (ROWS + "  a: {}\n  b: {tau: 0.1}", r"b/seed0 is the same run as a/seed0"),
    "seeds": ("seeds: [1, 1]\n" + ROWS + "  a: ", r"seeds \[1, 1\]: expected a list of different"),
    "one seed": ("seeds: 1\n" + ROWS + "  a: ", r"seeds 1: expected a list of different"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_an_error_names_the_place(write, text, message):
    with pytest.raises(SweepError, match=message):
        read_sweep(write(text)).runs("out")


def test_a_missing_file(tmp_path):
    with pytest.raises(SweepError, match=r"none\.yaml: cannot be read as YAML .*No such file"):
        read_sweep(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_of_the_repository_are_valid(path):
    sweep = read_sweep(path)
    assert len(sweep.runs("out")) > 1
    text = path.read_text()
    assert f"tdlrt compare experiments/{path.name}" in text
    assert "# Machine: " in text and " Time: " in text


def test_directories_of_other_runs_are_refused(tmp_path):
    (run,) = Sweep(options=SHARED, rows={"a": {}}).runs(tmp_path)
    check_directories([run])
    directory = RunDirectory(run.directory.path)
    directory.write_config(RunConfig(**SHARED, tau=0.2))
    with pytest.raises(RunError, match=r"seed0: the run there has different options: tau 0\.2"):
        check_directories([run])
    directory.write_config(run.config)
    check_directories([run])
    other = write_directory(tmp_path, "other", numbers={"versions": {"tdlrt": "0.0.1"}})
    directory.write_summary(json.loads(other.summary.read_text()))
    with pytest.raises(RunError, match=r"seed0: written by tdlrt 0\.0\.1, this is"):
        check_directories([run])
    directory.config.unlink()
    with pytest.raises(RunError, match=r"contains files, but not a run"):
        check_directories([run])


def test_data_are_read_before_the_first_run(tmp_path):
    options = {"model": "lenet5", "data": "mnist", "data_dir": str(tmp_path)}
    (run,) = Sweep(options=options, rows={"a": {}}).runs(tmp_path)
    with pytest.raises(DataError, match=r"train\.parquet: no such file"):
        check_data([run])
    run.directory.write_summary({})
    check_data([run])  # nothing left to do, nothing to read


def test_a_sweep_is_of_one_data_set(tmp_path):
    done, begun, new = Sweep(options=SHARED, rows={"a": {}}, seeds=(0, 1, 2)).runs(tmp_path)
    record = load_data(SHARED["data"]).record()
    done.directory.path.mkdir(parents=True)
    done.directory.write_summary({})
    begun.directory.checkpoint.parent.mkdir(parents=True)
    begun.directory.checkpoint.touch()
    for one in (done, begun):
        check_data([done, begun, new])
        one.directory.write_data(record | {"test": {"images": 3, "sha256": "a"}})
        with pytest.raises(RunError, match=rf"{one.directory.path}: .*different data, test images"):
            check_data([done, begun, new])
        one.directory.write_data(record)


def test_the_description_is_stored(tmp_path):
    describe(Sweep(options=SHARED, rows={"a": {}}, title="T", note="N"), tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text()) == {"title": "T", "note": "N"}
