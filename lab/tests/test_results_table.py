import pytest

from tdlrt_lab.config import RunConfig
from tdlrt_lab.sweep.plan import Sweep, read_sweep


@pytest.fixture
def table(script):
    return script("results_table")


@pytest.fixture
def mnist(script):
    return read_sweep(script("comparisons").EXPERIMENTS["mnist_lenet5"])


def result(method, seed, accuracy, **options):
    config = RunConfig(model="lenet5", data="mnist", method=method, seed=seed, **options)
    return {
        "row": method,
        "command": f"tdlrt train lenet5 --data mnist --seed {seed}",
        "model": "lenet5",
        "data": "mnist",
        "method": method,
        "tau": config.tau if method == "tdlrt" else None,
        "seed": seed,
        "epochs": config.epochs,
        "accuracy": accuracy,
        "compression": 0.5,
        "network_compression": 0.25,
        "network_parameters": 1000,
        "macs": 2000,
        "seconds": 30.0,
        "versions": {"torch": "2.13.0"},
        "machine": {"threads": 2},
        "config": config.to_dict(),
    }


def rows(text):
    return [line for line in text.splitlines() if line.startswith("| ")][2:]


def test_rows_hold_mean_and_deviation_over_the_seeds(table, mnist):
    results = [result("tdlrt", seed, accuracy) for seed, accuracy in enumerate((98.0, 99.0, 97.0))]
    results += [result("tdlrt", 0, 96.0, rank=0.25), result("dense", 0, 99.5)]
    text = table.section("mnist_lenet5", mnist, results)
    assert rows(text) == [
        "| dense | 0 | 99.50 | 50.0 | 25.0 | 1,000 | 2,000 |",
        "| tdlrt, tau 0.1 | 0, 1, 2 | 98.00 ± 1.00 | 50.0 | 25.0 | 1,000 | 2,000 |",
        "| tdlrt, tau 0.1, rank 0.25 | 0 | 96.00 | 50.0 | 25.0 | 1,000 | 2,000 |",
    ]
    lines = text.splitlines()
    assert "- versions: torch 2.13.0" in lines
    assert lines.count("tdlrt train lenet5 --data mnist --seed 0") == 3


def test_labels_name_what_a_row_does_not_share_with_the_experiment(table, mnist):
    rank = {"conv2": [16, 8, 5, 5], "fc*": 0.5}
    results = [
        result("tucker", 0, 97.0, rank=rank),
        result("tdlrt", 0, 98.0, budget=0.05, optimizer="adamw"),
        result("tdlrt", 0, 98.5, tau=0.2, integrator="bug", optimizer="adam", lr=0.01),
        result("dense", 0, 99.0, warmup=0.1),
    ]
    labels = [line.split(" | ")[0][2:] for line in rows(table.section("name", mnist, results))]
    assert labels == [
        "dense, warmup 0.1",
        "tdlrt, budget 0.05, optimizer adamw",
        "tdlrt, tau 0.2, integrator bug, optimizer adam, lr 0.01",
        "tucker, rank `conv2=16x8x5x5,fc*=0.5`",
    ]
    shares = {**mnist.options, "optimizer": "adamw", "warmup": 0.1}
    other = Sweep(options=shares, rows={})
    row = result("tdlrt", 0, 98.0, optimizer="adamw", warmup=0.1)
    assert table.label(other, [], row["config"]) == "tdlrt, tau 0.1"
    assert "optimizer adamw, warmup 0.1" in table.setting(other)


def test_results_from_before_an_option_are_read(table, mnist):
    old, new = result("tdlrt", 0, 98.0), result("tdlrt", 1, 99.0)
    for name in ("train_images", "budget", "ramp", "spare", "optimizer", "warmup"):
        del old["config"][name]
    assert len(rows(table.section("mnist_lenet5", mnist, [old, new]))) == 1


def test_many_seeds_are_written_as_a_range(table, mnist):
    for seeds, text in (((0, 1, 2), "0, 1, 2"), (range(5), "0 to 4"), ((0, 1, 2, 4), "0, 1, 2, 4")):
        section = table.compared(mnist, [result("tdlrt", seed, 98.0) for seed in seeds])
        assert table.seed_list(section.groups[0]) == text


def test_experiments_have_a_table_each(table, script):
    cifar = read_sweep(script("comparisons").EXPERIMENTS["cifar10_rescnn"])
    results = [result("tdlrt", seed, accuracy) for seed, accuracy in enumerate((70.0, 72.0))]
    text = table.section("cifar10_rescnn", cifar, results)
    assert text.startswith("## rescnn on cifar10: 4 epochs\n")
    assert "`python benchmarks/accuracy.py --only cifar10_rescnn`" in text
    assert cifar.note in " ".join(text.split())


def test_the_table_of_the_readme_holds_recorded_means(script):
    table, comparisons = script("readme_table"), script("comparisons")
    results = {name: comparisons.recorded(name) for name in comparisons.EXPERIMENTS}
    cells = [cell for row in table.CELLS.values() for cell in row if cell]
    for experiment, row in [*cells, *table.DENSE.values()]:
        assert len({one["seed"] for one in results[experiment] if one["row"] == row}) >= 3
    text = table.readme_table(results)
    for one in results["mnist_methods"]:
        if one["row"] == "tdlrt_budget=0.05":
            one["accuracy"] = 12.0
    assert "| TDLRT | 12.00" in table.readme_table(results)
    assert "| TDLRT | 12.00" not in text


def test_a_part_of_the_training_images_is_part_of_the_setting(table):
    shares = {"model": "rescnn", "data": "cifar10", "train_images": 20_000}
    assert "the first 20,000 training images" in table.setting(Sweep(options=shares, rows={}))


@pytest.fixture
def findings(script):
    return script("findings")


def sized(method, budget, accuracies, **more):
    return [
        result(method, seed, accuracy, budget=budget) | {"compression": 1 - (budget or 1)} | more
        for seed, accuracy in enumerate(accuracies)
    ]


def test_findings_place_every_method_against_ours_at_equal_size(findings):
    results = [
        *sized("dense", None, (99.0, 99.2)),
        *sized("tdlrt", 0.05, (99.2, 99.3, 99.25)),
        *sized("tdlrt", 0.01, (97.0, 97.1, 97.05)),
        *sized("snip", 0.05, (99.25, 99.26, 99.24)),
        *sized("snip", 0.01, (98.0, 98.1, 98.05)),
        *sized("tucker", 0.05, (90.0, 92.0, 91.0)),
        *sized("tucker", 0.01, (99.9,)),
    ]
    assert findings.equal_sizes(results).splitlines()[2:] == [
        "| 95 | 3 | 99.25 ± 0.05 | 91.00 ± 1.00 | - | dense 99.10, snip 99.25 | tucker 91.00 |",
        "| 99 | 3 | 97.05 ± 0.05 | 99.90 | dense 99.10, snip 98.05 | tucker 99.90 | - |",
    ]


def test_findings_name_the_largest_compression_that_is_as_good_as_dense(findings):
    results = [
        *sized("dense", None, (99.0, 99.2)),
        *sized("tdlrt", 0.05, (99.1, 99.1)),
        *sized("tdlrt", 0.03, (98.9, 98.95)),
        *sized("tdlrt", 0.01, (98.0,)),
    ]
    first, second = (" ".join(line.split()) for line in findings.bounds(results).split("\n-"))
    assert first.endswith("at or above that of dense, 99.10 %: 95.0 %, with 99.10 % in 2 runs.")
    assert second.endswith("0.2 points of that of dense, 99.10 %: 97.0 %, with 98.93 % in 2 runs.")


def test_findings_compare_with_factors_of_the_same_size(findings):
    results = [
        *sized("dense", None, (80.0, 81.0)),
        *sized("tdlrt", 0.05, (81.0,)),
        *sized("tdlrt", 0.1, (79.0, 80.0)),
        *sized("tucker", 0.1, (70.0,)),
        *sized("matrix", 0.05, (60.0,)),
        *sized("structured", 0.05, (82.0,)),
    ]
    assert findings.against(results) == [
        ["lenet5", "5", "90.0", "2", "79.50", "-1.00", "+9.50", "-", "-"],
        ["lenet5", "5", "95.0", "1", "81.00", "+0.50", "-", "+21.00", "-1.00"],
    ]
    assert findings.against([]) == []


def test_findings_show_a_linear_layer_as_a_tensor_beside_a_matrix_and_masks(findings):
    def reshaped(budget, accuracies, reshape):
        found = sized("tdlrt", budget, accuracies)
        return [one | {"config": one["config"] | {"reshape": reshape}} for one in found]

    results = [
        *sized("tdlrt", 0.02, (98.9, 99.0)),
        *sized("magnitude", 0.02, (99.1, 99.2)),
        *sized("snip", 0.02, (99.0,)),
    ]
    split = [
        *reshaped(0.02, (99.3, 99.4), "fc1=20x25:50x4x4"),
        *reshaped(0.01, (99.0,), "fc1=20x25:50x4x4"),
        *reshaped(0.02, (10.0,), "fc1=500:50x4x4"),
        *reshaped(0.02, (11.0,), None),
    ]
    assert findings.as_tensor(results, split).splitlines()[2:] == [
        "| 98 | 2: 98.95 ± 0.07 | 2: 99.35 ± 0.07 | 2: 99.15 ± 0.07 |",
        "| 99 | - | 1: 99.00 | - |",
    ]


def test_findings_are_empty_without_their_experiments(findings):
    assert findings.findings({}) == ""
    mnist = [
        *sized("dense", None, (99.0,)),
        *sized("tdlrt", 0.05, (98.0,), parameters=5, dense_parameters=9, ranks={"fc1": [7, 7]}),
    ]
    cifar = [*sized("dense", None, (80.0,)), *sized("tdlrt", 0.05, (81.0,))]
    text = findings.findings({"mnist_methods": mnist, "cifar10_vgg16": cifar})
    assert "leaves tdlrt rank 7;" in text
    assert "to it: lenet5 at 95.0 %." in " ".join(text.split())
