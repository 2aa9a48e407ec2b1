import pytest
import yaml

from tdlrt_lab.sweep.plan import read_sweep
from tdlrt_lab.sweep.recorded import read_results

OPTIONS = {"model": "lenet5", "data": "digits", "epochs": 1, "batch_size": 256}
ROWS = {"dense": {"method": "dense"}, "budget": {"budget": [0.2]}}


@pytest.fixture
def write(tmp_path):
    """Write the description of the experiment."""

    def to_file(options=OPTIONS, rows=ROWS, seeds=(0, 1)):
        text = yaml.safe_dump({"options": options, "rows": rows, "seeds": list(seeds)})
        (tmp_path / "digits.yaml").write_text(text)

    return to_file


@pytest.fixture
def accuracy(script, monkeypatch, tmp_path, write):
    """The script, with an experiment on the digits and a place of its own for the results."""
    module = script("accuracy")
    write()
    monkeypatch.setattr(module, "EXPERIMENTS", {"digits": tmp_path / "digits.yaml"})
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


@pytest.fixture
def start(accuracy, tmp_path, capsys):
    """Run the script; gives its lines and the results that are there afterwards."""

    def call(*words):
        accuracy.main([*words, "--runs", str(tmp_path / "runs")])
        results = read_results(tmp_path / "results" / "digits.jsonl")
        found = {(result["row"], result["seed"]): result for result in results}
        return capsys.readouterr().out.splitlines(), found

    return call


def test_a_result_per_row_and_seed_once(start):
    dense = ("dense", 0)
    assert [*start("--only", "dense", "--seeds", "0")[1]] == [dense]
    lines, results = start()
    assert [*results] == [("budget_budget=0.2", 0), ("budget_budget=0.2", 1), dense, ("dense", 1)]
    assert [line for line in lines if line.endswith("done before")] == [
        "digits/dense/seed0: done before"
    ]
    lines, results = start()
    assert len(lines) == 4 and all(line.endswith("done before") for line in lines)
    result = results["budget_budget=0.2", 1]
    assert (result["seed"], result["budget"]) == (1, 0.2)
    assert result["command"] == (
        "tdlrt train lenet5 --data digits --budget 0.2 --epochs 1 --batch-size 256 --seed 1"
    )


def test_a_failed_run_does_not_stop_the_others(start, write, capsys):
    write(rows={**ROWS, "dense": {"method": "dense", "lr": 1e20}}, seeds=(0,))
    with pytest.raises(SystemExit, match=r"1 runs failed: digits/dense/seed0"):
        start()
    assert "dense/seed0: failed: step 2 of 6: the loss (nan)" in capsys.readouterr().out
    assert [*start("--only", "budget_*")[1]] == [("budget_budget=0.2", 0)]


def test_a_finished_run_that_was_not_recorded_is_recorded(start, tmp_path):
    words = ("--only", "digits/dense", "--seeds", "0")
    results = start(*words)[1]
    (tmp_path / "results" / "digits.jsonl").unlink()
    assert start(*words)[1] == results


def test_a_result_with_other_options_is_not_taken_for_the_row(start, write):
    start("--only", "dense", "--seeds", "0")
    write(options={**OPTIONS, "epochs": 2})
    with pytest.raises(SystemExit, match=r"the run of dense/seed0 had another epochs than"):
        start()


def test_unknown_names(start):
    with pytest.raises(SystemExit, match=r"--only tense: fits no row; .*=0.2, digits/dense"):
        start("--only", "dense", "tense")


@pytest.fixture
def comparisons(script):
    return script("comparisons")


def test_the_commands_of_the_experiments(accuracy, comparisons, monkeypatch, start):
    monkeypatch.setattr(accuracy, "EXPERIMENTS", comparisons.EXPERIMENTS)
    lines, results = start("--dry-run", "--data-dir", "somewhere", "--seeds", "0", "7")
    assert results == {}
    assert all(line.startswith("tdlrt train ") and "DATA_DIR" in line for line in lines)


def test_every_recorded_result_is_one_of_a_run_of_its_experiment(accuracy, comparisons):
    names = {path.stem for path in comparisons.RESULTS.glob("*.jsonl")}
    assert names <= comparisons.EXPERIMENTS.keys()
    descriptions = {*comparisons.EXPERIMENTS.values()}
    assert descriptions == {*(comparisons.ROOT / "experiments/recorded").glob("*.yaml")}
    for name in names:
        results = comparisons.recorded(name)
        seeds = {"seeds": sorted({result["seed"] for result in results})}
        runs = read_sweep(comparisons.EXPERIMENTS[name], seeds).runs(".")
        places = {(run.row, run.config.seed): run for run in runs}
        for result in results:
            run = places[result["row"], result["seed"]]
            assert run.config.differences(comparisons.stored_options(result)) == [], run.name


def test_the_learning_rates_of_mnist_methods_are_the_best_of_mnist_tuning(comparisons):
    best = {}
    for result in comparisons.recorded("mnist_tuning"):
        known = best.setdefault(result["method"], result)
        if result["accuracy"] > known["accuracy"]:
            best[result["method"]] = result
    runs = read_sweep(comparisons.EXPERIMENTS["mnist_methods"]).runs(".")
    assert best.keys() == {run.config.method for run in runs} - {"dense", "tdlrt"}
    for run in runs:
        if run.config.method in best:
            assert run.config.lr == best[run.config.method]["config"]["lr"], run.name


def test_the_learning_rates_of_stdlib_gpt_are_the_best_of_its_tuning(comparisons):
    found = {}
    for result in comparisons.recorded("stdlib_gpt_tuning"):
        bits, rate = result["bits_per_character"], result["config"]["lr"]
        found.setdefault(result["method"], []).append((bits, rate))
    for run in read_sweep(comparisons.EXPERIMENTS["stdlib_gpt"]).runs("."):
        rates = found.get(run.config.method, [])
        if len(rates) == 4:
            assert run.config.lr == min(rates)[1], run.name
