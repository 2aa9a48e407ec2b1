import json

import pytest

from tdlrt.errors import RunError
from tdlrt_lab.reports.collect import collect
from tdlrt_lab.reports.groups import sections


def labels(root):
    (section,) = sections(collect(root)[0])
    return [group.label for group in section.groups]


def problems(root):
    return {problem.path: problem.text for problem in collect(root)[1]}


def test_runs_are_grouped_by_options_and_sorted(sweep):
    runs, found = collect(sweep)
    assert (len(runs), found) == (8, [])
    (section,) = sections(runs)
    assert labels(sweep) == ["dense", "tdlrt, tau 0.1", "tdlrt, tau 0.2", "tucker"]
    assert [len(group.runs) for group in section.groups] == [2, 2, 2, 2]
    assert {name: len(groups) for name, groups in section.series.items()} == {
        "tdlrt": 2,
        "tucker": 1,
    }
    dense, small, *_ = section.groups
    assert section.references == [dense]
    assert dense.values("accuracy") == [95.0, 96.0]
    assert (small.mean("accuracy"), small.deviation("seconds")) == (93.5, 0.0)
    assert section.setting == "3 epochs, batch 32"


def test_labels_name_what_differs_within_a_recipe(write_run, tmp_path):
    write_run("a", tau=0.1, compression=0.5)
    write_run("b", tau=0.1, integrator="bug", compression=0.5)
    write_run("c", budget=0.2, compression=0.8)
    write_run("d", budget=0.2, adapt_every=5, compression=0.8)
    assert sorted(labels(tmp_path)) == [
        "tdlrt, budget 0.2, adapt every 10",
        "tdlrt, budget 0.2, adapt every 5",
        "tdlrt, tau 0.1, integrator bug",
        "tdlrt, tau 0.1, integrator parallel",
    ]
    (section,) = sections(collect(tmp_path)[0])
    assert "tdlrt, integrator bug, by tau" in section.series


def test_an_option_that_goes_with_the_recipe_alone_is_named_if_it_is_no_default(
    write_run, tmp_path
):
    write_run("a", tau=0.1, integrator="bug", compression=0.5)
    write_run("b", budget=0.2, compression=0.8)
    assert sorted(labels(tmp_path)) == ["tdlrt, budget 0.2", "tdlrt, tau 0.1, integrator bug"]


def test_networks_and_data_sets_have_sections_of_their_own(write_run, tmp_path):
    write_run("a", method="dense")
    write_run("b", method="dense", model="rescnn")
    found = sections(collect(tmp_path)[0])
    assert [section.title for section in found] == ["lenet5 on digits", "rescnn on digits"]
    assert found[0].name == "lenet5-digits"


def test_runs_in_any_state_are_named(sweep, write_run):
    write_run("half/seed0", tau=0.3).summary.unlink()
    (sweep / "half" / "seed0" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    write_run("crashed/seed0", tau=0.4).summary.unlink()
    (sweep / "crashed" / "seed0.error.json").write_text('{"error": "out of memory"}')
    (sweep / "early").mkdir()
    (sweep / "early" / "seed0.error.json").write_text('{"error": "no data"}')
    (sweep / "early" / f"seed0.error.json.{'0' * 16}.part").write_text("{")  # half written
    (sweep / "torn").mkdir()
    (sweep / "torn" / "seed0.error.json").write_text("{")
    write_run("nan/seed0", tau=0.5, numbers={"accuracy": float("nan")})
    write_run("text/seed0", tau=0.6, numbers={"seconds": "long"})
    write_run("broken/seed0", tau=0.7).summary.write_text('{"accuracy":')
    write_run("list/seed0", tau=0.75).summary.write_text("[]")
    write_run("no-config/seed0", tau=0.8).config.unlink()
    lacking = write_run("lacking/seed0", tau=0.9)
    lacking.summary.write_text('{"accuracy": 1}')
    assert len(collect(sweep)[0]) == 8
    expected = {
        "half/seed0": "left out: not finished: 1 of 3 epochs are stored",
        "crashed/seed0": "left out: failed: out of memory",
        "early/seed0": "left out: failed: no data",
        "torn/seed0": "left out: failed; seed0.error.json cannot be read",
        "nan/seed0": "summary.json: accuracy is nan; expected a finite number",
        "text/seed0": "summary.json: seconds is 'long'; expected a finite number",
        "broken/seed0": "cannot read the result of a finished run",
        "list/seed0": "summary.json: got list, expected an object",
        "no-config/seed0": "config.yaml: cannot be read",
        "lacking/seed0": "summary.json: no compression; expected the result of a run",
    }
    found = problems(sweep)
    assert found.keys() == expected.keys()
    for path, text in expected.items():
        assert text in found[path]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ({"accuracy": 101}, "accuracy is 101; expected a finite number from 0 to 100"),
        ({"compression": 1.5}, "compression is 1.5; expected a finite number from -inf to 1"),
        ({"seconds": -1}, "seconds is -1; expected a finite number from 0 to inf"),
        ({"network_parameters": [1]}, "network_parameters is [1]; expected a finite number"),
        ({"tau": "small"}, "tau is 'small'; expected a finite number"),
        ({"seed": 2}, "seed is 2; expected 1, as in config.yaml"),
        ({"layers": [{"name": "a"}]}, "layers is [{'name': 'a'}]; expected name, shape, ranks"),
        ({"accuracy": 10**400}, "accuracy is 1000"),
        ({"macs": {}}, "macs is {}; expected a finite number"),
        ({"versions": "0.1"}, "versions is '0.1'; expected names with values"),
        ({"machine": 2}, "machine is 2; expected names with values"),
        ({"seed": "one"}, "seed is 'one'; expected an integer from 0"),
        ({"method": ["dense"]}, "method is ['dense']; expected a name"),
        ({"model": "vgg16"}, "model is 'vgg16'; expected 'lenet5', as in config.yaml"),
    ],
)
def test_a_summary_that_no_run_writes_is_left_out(write_run, tmp_path, numbers, text):
    write_run("good", method="dense")
    write_run("bad", method="dense", seed=1, numbers=numbers)
    assert [run.path for run in collect(tmp_path)[0]] == ["good"]
    assert f"summary.json: {text}" in problems(tmp_path)["bad"]


@pytest.mark.parametrize("option", ["epochs", "batch_size", "train_images"])
def test_options_of_any_type_do_not_stop_a_report(write_run, tmp_path, option):
    directory = write_run("a", method="dense")
    stored = {**directory.read_config(), option: [1]}
    directory.config.write_text(json.dumps(stored))
    (section,) = sections(collect(tmp_path)[0])
    assert section.setting


def test_odd_runs_are_kept_and_named(write_run, tmp_path):
    write_run("old", method="dense", numbers={"versions": {"tdlrt": "0.0.1"}})
    curves = write_run("curves", compression=0.5)
    curves.metrics.write_text('{"epoch": 1, "loss"')
    lost = write_run("lost", tau=0.2, compression=0.5)
    lines = lost.metrics.read_text().splitlines()
    lost.metrics.write_text(
        "\n".join([json.dumps({**json.loads(lines[0]), "loss": float("nan")}), *lines[1:]])
    )
    assert len(collect(tmp_path)[0]) == 3
    found = problems(tmp_path)
    assert found["old"].startswith("written by tdlrt 0.0.1; this report by ")
    assert found["curves"].startswith("metrics.jsonl cannot be read (")
    assert found["curves"].endswith("); the curves of this run are missing")
    assert found["lost"].startswith("epoch 1: loss nan, accuracy ")


def test_copies_count_once(write_run, tmp_path):
    write_run("a", method="dense")
    write_run("b", method="dense")
    assert len(collect(tmp_path)[0]) == 1
    assert problems(tmp_path) == {"b": "left out: the same options and seed as a"}


def test_baselines_are_runs_and_the_report_is_none(write_run, tmp_path):
    write_run("a", compression=0.5)
    write_run("a/baseline", method="dense")
    write_run("report/old", tau=0.4)
    assert [run.path for run in collect(tmp_path)[0]] == ["a", "a/baseline"]


def test_folders_without_runs(tmp_path):
    with pytest.raises(RunError, match=r"none: no such folder"):
        collect(tmp_path / "none")
    with pytest.raises(RunError, match=r"no run directories; expected the output of tdlrt train"):
        collect(tmp_path)


def test_the_setting_holds_what_all_runs_share(write_run, tmp_path):
    for name, epochs, size in (("a", 1, 32), ("b", 1, 64), ("c", 5, 64)):
        write_run(name, method="dense", epochs=epochs, batch_size=size)
    runs, _ = collect(tmp_path)
    assert sections(runs[:1])[0].setting == "1 epoch, batch 32"
    assert sections(runs[:2])[0].setting == "1 epoch"
    assert sections(runs)[0].setting == ""


def images(training, test="t"):
    parts = {"training": training, "test": test}
    return {name: {"images": 5, "sha256": sha256} for name, sha256 in parts.items()}


def test_runs_on_other_images_under_one_name_are_said(write_run, tmp_path):
    write_run("a/seed0", seed=0, numbers={"images": images("x")})
    write_run("a/seed1", seed=1, numbers={"images": images("x")})
    write_run("a/seed2", seed=2, numbers={"images": images("y")})
    write_run("a/seed3", seed=3, numbers={"images": images("x", test="u")})
    write_run("b", seed=0, train_images=3, numbers={"images": images("z")})  # fewer of them
    write_run("c", seed=4)  # as earlier versions wrote it
    write_run("d", seed=0, data="mnist", numbers={"images": images("y", test="u")})
    assert len(collect(tmp_path)[0]) == 7
    assert problems(tmp_path) == {
        "a/seed2": "other training images than a/seed0; do not compare the two",
        "a/seed3": "other test images than a/seed0; do not compare the two",
    }


def test_equal_options_on_other_images_are_another_run(write_run, tmp_path):
    write_run("a", numbers={"images": images("x")})
    write_run("b", numbers={"images": images("x")})
    write_run("c", numbers={"images": images("y")})
    runs, found = collect(tmp_path)
    assert [run.path for run in runs] == ["a", "c"]
    assert {problem.path for problem in found} == {"b", "c"}
