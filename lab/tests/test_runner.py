import json
import math
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import tdlrt
from tdlrt.errors import ConfigError, NonFiniteError, RunError
from tdlrt.ranks import (
    CubicSchedule,
    FixedRank,
    LinearSchedule,
    ParameterBudget,
    RelativeTolerance,
)
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import load_data
from tdlrt_lab.models import build_model
from tdlrt_lab.run.checkpoint import load_checkpoint, save_checkpoint
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.run.runner import Interrupted, Observer, run
from tdlrt_lab.run.signals import stop_requests
from tdlrt_lab.run.training import Training

# Three epochs of six steps; a start and a tolerance with which ranks move at once.
CONFIG = RunConfig(
    model="lenet5", data="digits", epochs=3, batch_size=256, tau=0.5, init_scale=1.0, freeze_at=0.7
)


class StopAfter(Observer):
    """Send a signal to this process after a number of steps."""

    def __init__(self, *steps, number=signal.SIGINT):
        self.steps = set(steps)
        self.number = number

    def stepped(self, training):
        if training.step in self.steps:
            signal.raise_signal(self.number)


def without_times(directory):
    return [replace(metrics, seconds=0.0) for metrics in directory.read_metrics()]


def contents(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = RunDirectory(tmp_path_factory.mktemp("runs") / "whole")
    run(CONFIG, directory.path, baseline=True, command="tdlrt train lenet5")
    return directory


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def test_run_directory_holds_what_the_contract_says(finished):
    summary = finished.read_summary()
    wanted = {"accuracy", "dense_accuracy", "compression", "network_compression", "parameters"}
    wanted |= {"dense_parameters", "ranks", "seconds", "seed", "method", "tau", "versions"}
    assert wanted <= summary.keys()
    assert set(summary["versions"]) == {"python", "torch", "tdlrt"}
    last = finished.read_metrics()[-1]
    assert summary["accuracy"] == last.test_accuracy
    assert summary["ranks"] == last.ranks
    assert summary["compression"] == 1 - summary["parameters"] / summary["dense_parameters"]
    assert summary["dense_accuracy"] == finished.baseline.read_summary()["accuracy"]
    assert summary["command"] == "tdlrt train lenet5"
    assert finished.read_config() == CONFIG.to_dict()
    assert {path.name for path in finished.plots.iterdir()} == {
        "accuracy.png",
        "loss.png",
        "compression.png",
        "ranks.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in finished.plots.iterdir())


def test_baseline_is_a_whole_run_with_its_own_learning_rate(finished):
    stored = finished.baseline.read_config()
    assert stored == {**CONFIG.to_dict(), "method": "dense", "lr": 0.02}
    assert len(finished.baseline.read_metrics()) == 3
    summary = finished.baseline.read_summary()
    assert (summary["parameters"], summary["dense_parameters"]) == (131_080, 131_080)
    assert (summary["compression"], summary["network_compression"]) == (0, 0)


def test_stored_model_is_the_trained_one(finished):
    weights = load_file(finished.model)
    ranks = finished.read_summary()["ranks"]
    assert {name: list(weights[f"{name}.core"].shape) for name in ranks} == ranks
    checkpoint = torch.load(finished.checkpoint, weights_only=True)
    assert all(torch.equal(weights[name], t) for name, t in checkpoint["model"].items())


def test_stored_model_loads_into_a_new_dense_network(finished):
    model = build_model("lenet5", (1, 8, 8), 10)
    texts = tdlrt.load(finished.model, model)
    assert texts == {"model": "lenet5", "data": "digits", "method": "tdlrt", "tau": "0.5"}
    weights = load_file(finished.model)
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    texts = tdlrt.load(finished.baseline.model, build_model("lenet5", (1, 8, 8), 10))
    assert texts == {"model": "lenet5", "data": "digits", "method": "dense"}


@pytest.fixture(scope="module", params=["parallel", "bug"])
def uninterrupted(request, finished, tmp_path_factory):
    """A configuration and the directory of its run."""
    if request.param == "parallel":
        return CONFIG, finished
    config = replace(CONFIG, integrator="bug", core_steps=2)
    directory = RunDirectory(tmp_path_factory.mktemp("runs") / "bug")
    run(config, directory.path)
    return config, directory


@pytest.mark.parametrize("stops", [(1,), (3, 9), (6, 12), (17,)], ids=str)
def test_interrupted_and_resumed_equals_uninterrupted(uninterrupted, tmp_path, stops):
    config, whole = uninterrupted
    parts = RunDirectory(tmp_path / "parts")
    for number, step in enumerate(stops):
        with pytest.raises(Interrupted, match=rf"interrupted after step {step} of 18"):
            run(config, parts.path, resume=number > 0, observer=StopAfter(step))
        assert not parts.summary.exists()
    run(config, parts.path, resume=True)
    assert without_times(parts) == without_times(whole)
    assert contents(parts.path)[parts.model] == contents(whole.path)[whole.model]


SHORT = {"model": "lenet5", "data": "digits", "epochs": 3, "batch_size": 256}


class SeeRanks(Observer):
    """Compare the ranks after every step with those before."""

    def __init__(self):
        self.ranks, self.changes = {}, []

    def started(self, training, data):
        self.stepped(training)

    def stepped(self, training):
        new = training.ranks
        if changed := {name: row for name, row in new.items() if self.ranks.get(name) != row}:
            self.changes.append([training.step, changed])
        self.ranks = new


@pytest.mark.parametrize(
    ("config", "least"),
    [
        (CONFIG, 3),
        (RunConfig(**SHORT, method="posthoc", budget=0.3), 1),
        (RunConfig(**SHORT, method="dense"), 0),
    ],
    ids=["tdlrt", "posthoc", "dense"],
)
def test_every_change_of_ranks_is_recorded_in_its_epoch(tmp_path, config, least):
    seen = SeeRanks()
    run(config, tmp_path / "run", observer=seen)
    history = RunDirectory(tmp_path / "run").read_metrics()
    assert [metrics.steps for metrics in history] == [6, 12, 18]
    epochs = [[c for c in seen.changes if n - 6 < (c[0] or 1) <= n] for n in (6, 12, 18)]
    assert [metrics.rank_changes for metrics in history] == epochs
    assert len(seen.changes) >= least


def test_a_checkpoint_of_an_earlier_version_continues_the_ranks_from_there(tmp_path, digits):
    training = Training(CONFIG, digits)
    start = training.ranks
    steps = iter([False] * 4 + [True])
    assert not list(training.epochs(lambda: next(steps), lambda training: None))
    state = training.state_dict()
    assert state["rank_changes"][0] == [0, start]
    del state["rank_changes"]
    other = Training(CONFIG, digits)
    other.load_state_dict(state)
    next(_epochs(training))
    metrics = next(_epochs(other))
    assert metrics.rank_changes == [c for c in training.history[0].rank_changes if c[0] > 4]


def test_the_ranks_of_that_comparison_move(finished, digits):
    start = Training(CONFIG, digits).ranks
    first, second, _ = (metrics.ranks for metrics in finished.read_metrics())
    assert start != first != second


@pytest.mark.parametrize(("freeze_at", "moves"), [(0.0, False), (0.5, True)])
def test_ranks_stay_from_the_given_share_of_the_training(digits, freeze_at, moves):
    training = Training(replace(CONFIG, epochs=2, freeze_at=freeze_at), digits)
    start = training.ranks
    first, second = (metrics.ranks for metrics in _epochs(training))
    assert (first != start) == moves
    assert second == first


@pytest.mark.parametrize("spare", [0.0, 0.5])
def test_ranks_given_by_hand_stay_without_adaptation(digits, spare):
    """Neither a budget nor spare directions touch ranks that stay from the first step."""
    config = replace(CONFIG, tau=None, budget=0.02, spare=spare, freeze_at=0.0, epochs=1)
    training = Training(config, digits)
    start = training.ranks
    assert next(_epochs(training)).ranks == start


@pytest.mark.parametrize("freeze_at", [0.7, 1.0])
@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_spare_directions_are_given_up_when_the_ranks_stay(digits, freeze_at, integrator):
    config = replace(
        CONFIG, tau=None, budget=0.1, spare=1.0, freeze_at=freeze_at, integrator=integrator
    )
    first, _, last = _epochs(Training(config, digits))
    assert 0.8 <= first.compression < 0.9 <= last.compression


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ({"tau": 0.2, "spare": 0.5}, RelativeTolerance(0.2, spare=0.5)),
        ({"tau": 0.2, "ramp": "cubic"}, RelativeTolerance(CubicSchedule(0.0, 0.2, 60))),
        ({"budget": 0.05, "ramp": "constant", "spare": 0.0}, ParameterBudget(0.05)),
        ({"budget": 0.05}, ParameterBudget(LinearSchedule(0.5, 0.05, 60, 40), spare=0.25)),
        (
            {"budget": 0.05, "budget_start": 0.75},
            ParameterBudget(LinearSchedule(0.75, 0.05, 60, 40), spare=0.25),
        ),
        (
            {"budget": 0.05, "ramp": "cubic", "spare": 0.25},
            ParameterBudget(CubicSchedule(0.5, 0.05, 60, 40), spare=0.25),
        ),
        (
            {"budget": 0.6, "ramp": "linear", "spare": 0.0},
            ParameterBudget(LinearSchedule(0.6, 0.6, 60, 40)),
        ),
        ({"tau": 0.2, "freeze_at": 0.0}, FixedRank()),
    ],
)
def test_rank_policy(digits, options, policy):
    """A hundred steps until the ranks stay."""
    config = RunConfig(
        model="lenet5", data="digits", epochs=20, batch_size=150, **{"freeze_at": 0.5, **options}
    )
    optimizer = Training(config, digits).optimizer
    assert optimizer.rank_policy == policy
    assert optimizer.freeze_after == (None if policy == FixedRank() else 100)


TUCKER = RunConfig(
    model="lenet5",
    data="digits",
    epochs=3,
    batch_size=256,
    method="tucker",
    rank={"conv2": [10, 4, 3, 3], "fc1": 6},
    optimizer="adam",
    lr=1e-3,
    warmup=0.3,
)
BUDGET = replace(
    CONFIG, tau=None, budget=0.2, ramp="cubic", spare=0.5, optimizer="adamw", lr=1e-3, warmup=0.3
)
PENALTY = replace(CONFIG, spectral_penalty=0.01)
BFLOAT16 = replace(BUDGET, precision="bfloat16")


@pytest.mark.parametrize(
    "config",
    [TUCKER, BUDGET, PENALTY, BFLOAT16],
    ids=["tucker", "budget", "penalty", "bfloat16"],
)
def test_every_method_and_optimiser_is_resumed_exactly(tmp_path, config):
    whole, parts = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "parts")
    summary = run(config, whole.path)
    with pytest.raises(Interrupted):
        run(config, parts.path, observer=StopAfter(4))
    with pytest.raises(Interrupted):
        run(config, parts.path, resume=True, observer=StopAfter(14))
    run(config, parts.path, resume=True)
    assert without_times(parts) == without_times(whole)
    assert contents(parts.path)[parts.model] == contents(whole.path)[whole.model]
    assert summary["config"] == config.to_dict()
    assert summary["budget"] == config.budget


def test_free_factors_are_trained_by_the_plain_optimiser_at_their_ranks(digits):
    torch.manual_seed(0)
    training = Training(TUCKER, digits)
    torch.manual_seed(0)
    dense = Training(replace(TUCKER, method="dense"), digits).model
    assert training.ranks == {"conv2": [10, 4, 3, 3], "fc1": [6, 6]}
    assert isinstance(training.model.conv1, torch.nn.Conv2d)
    assert type(training.optimizer) is torch.optim.Adam
    trained = {p for group in training.optimizer.param_groups for p in group["params"]}
    assert trained == set(training.model.parameters())
    for name in training.ranks:
        norm = training.model.get_submodule(name).dense_weight().norm()
        torch.testing.assert_close(norm, dense.get_submodule(name).weight.norm())
    before = [factor.clone() for factor in training.model.conv2.factors]
    metrics = list(_epochs(training))
    assert all(epoch.ranks == training.ranks for epoch in metrics)
    after = training.model.conv2.factors
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_learning_rate_rises_and_falls(digits):
    config = replace(CONFIG, method="dense", lr=0.3, warmup=0.1, epochs=5)  # 3 of 30 steps
    rates = []
    for _ in Training(config, digits).epochs(lambda: False, lambda t: rates.append(t._lr)):
        pass
    assert rates[:4] == pytest.approx([0.075, 0.15, 0.225, 0.3])
    cosine = [0.15 * (1 + math.cos(math.pi * step / 27)) for step in range(27)]
    assert rates[3:] == pytest.approx(cosine)


def test_warmup_leaves_a_step_for_the_cosine(digits):
    training = Training(replace(CONFIG, epochs=1, warmup=0.99), digits)
    assert next(_epochs(training)).lr == pytest.approx(CONFIG.lr)


def _epochs(training):
    return training.epochs(lambda: False, lambda training: None)


def test_validation_images_take_the_place_of_the_test_set(tmp_path):
    directory = RunDirectory(tmp_path)
    config = replace(CONFIG, epochs=1, validation=100, augment="standard")
    summary = run(config, directory.path, baseline=True)
    (metrics,) = directory.read_metrics()
    assert (metrics.test_accuracy, metrics.split) == (None, "validation")
    assert summary["split"] == directory.baseline.read_summary()["split"] == "validation"
    assert summary["accuracy"] == metrics.validation_accuracy == metrics.accuracy
    assert summary["dense_accuracy"] == directory.baseline.read_metrics()[0].validation_accuracy
    assert summary["accuracy"] == pytest.approx(round(summary["accuracy"]))  # of 100 images


def test_metrics_of_earlier_versions_are_read_as_of_the_test_set(finished, tmp_path):
    directory = RunDirectory(tmp_path)
    lines = [json.loads(line) for line in finished.metrics.read_text().splitlines()]
    for line in lines:
        del line["validation_accuracy"], line["steps"], line["rank_changes"]
    directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = [replace(metrics, steps=0, rank_changes=[]) for metrics in finished.read_metrics()]
    assert directory.read_metrics() == expected
    assert directory.read_metrics()[0].split == "test"


def test_training_images_move_by_seed_and_epoch_alone(digits):
    def moves(seed, epoch, augment="standard"):
        training = Training(replace(CONFIG, seed=seed, augment=augment), digits)
        return training.batches.moves(epoch)

    assert torch.equal(moves(0, 1), moves(0, 1))
    assert not torch.equal(moves(0, 1), moves(0, 2))
    assert not torch.equal(moves(0, 1), moves(1, 1))
    assert moves(0, 1, "none") is None


def test_termination_signal_stores_a_checkpoint_too(tmp_path):
    with pytest.raises(Interrupted):
        run(CONFIG, tmp_path / "run", observer=StopAfter(2, number=signal.SIGTERM))
    assert RunDirectory(tmp_path / "run").checkpoint.exists()


@pytest.fixture
def ordinary_interrupts():
    """SIGINT as Python has it, whatever the shell that started the tests says."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_second_signal_stops_at_once(ordinary_interrupts):
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_interrupted_baseline_is_resumed_without_the_run_before_it(finished, tmp_path):
    class StopDense(StopAfter):
        def stepped(self, training):
            if training.config.method == "dense":
                super().stepped(training)

    directory = RunDirectory(tmp_path / "run")
    with pytest.raises(Interrupted, match=r"baseline"):
        run(CONFIG, directory.path, baseline=True, observer=StopDense(8))
    assert directory.read_summary()["dense_accuracy"] is None
    trained = contents(directory.path)[directory.model]
    run(CONFIG, directory.path, baseline=True, resume=True)
    expected = finished.read_summary()["dense_accuracy"]
    assert directory.read_summary()["dense_accuracy"] == expected
    assert without_times(directory.baseline) == without_times(finished.baseline)
    assert contents(directory.path)[directory.model] == trained


def test_resuming_a_finished_run_says_so_and_changes_nothing(finished):
    class Listener(Observer):
        told = ()

        def already_finished(self, directory):
            self.told += (directory.path.name,)

        def started(self, training, data):
            raise AssertionError

    before, listener = contents(finished.path), Listener()
    summary = run(CONFIG, finished.path, resume=True, observer=listener)
    assert listener.told == ("whole",)
    assert summary == json.loads(finished.summary.read_text())
    assert contents(finished.path) == before


def test_resume_before_the_first_checkpoint_starts_at_the_beginning(finished, tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_config(CONFIG)
    run(CONFIG, directory.path, resume=True)
    assert without_times(directory) == without_times(finished)


def test_overwrite_replaces_run_and_baseline(finished, tmp_path):
    copy = RunDirectory(tmp_path / "copy")
    shutil.copytree(finished.path, copy.path)
    config = replace(CONFIG, epochs=1)
    run(config, copy.path, overwrite=True)
    assert len(copy.read_metrics()) == 1
    assert not copy.baseline.path.exists()


DAMAGES = {
    "format": (lambda state: {**state, "format": 99}, r"format 99; expected a .* of format 1"),
    "type": (lambda state: [1, 2], r"format None; expected a checkpoint of format 1"),
    "keys": (lambda state: {"format": 1}, r"does not fit the network of this run \('model'\)"),
    "rank": (
        lambda state: {**state, "model": {**state["model"], "conv2.core": torch.zeros(3, 3)}},
        r"does not fit the network",
    ),
    "optimiser": (lambda state: {**state, "optimizer": {}}, r"does not fit the network"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_unfit_checkpoint_is_refused_and_nothing_changes(tmp_path, damage, message):
    directory = _interrupted(tmp_path)
    state = torch.load(directory.checkpoint, weights_only=True)
    torch.save(damage(state), directory.checkpoint)
    _refused(directory, message)


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_truncated_checkpoint_is_refused_and_nothing_changes(tmp_path, size):
    directory = _interrupted(tmp_path)
    directory.checkpoint.write_bytes(directory.checkpoint.read_bytes()[:size])
    _refused(directory, r"not a readable checkpoint")


def test_checkpoint_of_another_network_is_refused(tmp_path, digits):
    directory = _interrupted(tmp_path)
    other = Training(RunConfig(model="rescnn", data="digits"), digits)
    save_checkpoint(other, directory.checkpoint)
    _refused(directory, r"does not fit the network of this run")


def _interrupted(path):
    with pytest.raises(Interrupted):
        run(CONFIG, path / "run", observer=StopAfter(2))
    return RunDirectory(path / "run")


def _refused(directory, message):
    before = contents(directory.path)
    with pytest.raises(RunError, match=r"last\.pt: " + message):
        run(CONFIG, directory.path, resume=True)
    assert contents(directory.path) == before


def test_checkpoint_can_run_no_code(tmp_path, digits):
    torch.save({"format": 1, "model": StopAfter(1)}, tmp_path / "last.pt")
    with pytest.raises(RunError, match=r"not a readable checkpoint"):
        load_checkpoint(Training(CONFIG, digits), tmp_path / "last.pt")


def test_contradicting_arguments(tmp_path):
    with pytest.raises(ConfigError, match=r"resume and overwrite: expected one of them"):
        run(CONFIG, tmp_path, resume=True, overwrite=True)
    with pytest.raises(ConfigError, match=r"baseline: the method is 'dense' already"):
        run(replace(CONFIG, method="dense"), tmp_path, baseline=True)


def test_unusable_directory_is_found_before_the_data_are_read(tmp_path):
    (tmp_path / "file").write_text("")
    config = RunConfig(model="lenet5", data="mnist", data_dir="nowhere")
    with pytest.raises(RunError, match=r"cannot be written"):
        run(config, tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("dense", r"step 2 of 18: the loss \(nan\) .*--lr, now 1e\+20.*; nothing was stored yet"),
        ("tdlrt", r"NaN or infinite"),
    ],
)
def test_divergence_ends_the_run(tmp_path, method, message):
    config = replace(CONFIG, method=method, lr=1e20)
    with pytest.raises(NonFiniteError, match=message):
        run(config, tmp_path / "run")
    assert not RunDirectory(tmp_path / "run").summary.exists()


def test_both_methods_start_from_the_same_network(digits):
    config = replace(CONFIG, rank="full")
    torch.manual_seed(0)
    tucker = Training(config, digits).model
    torch.manual_seed(0)
    dense = Training(replace(config, method="dense"), digits).model
    for name in ("conv1", "conv2", "fc1"):
        weight = dense.get_submodule(name).weight
        torch.testing.assert_close(tucker.get_submodule(name).dense_weight(), weight)
        assert torch.equal(tucker.get_submodule(name).bias, dense.get_submodule(name).bias)
    assert torch.equal(tucker.head.weight, dense.head.weight)


def test_order_depends_on_seed_and_epoch_alone(digits):
    def order(seed, epoch):
        training = Training(replace(CONFIG, seed=seed), digits)
        torch.rand(3)
        return training.batches.order(epoch).tolist()

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == list(range(1437))
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_a_run_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    run(replace(CONFIG, epochs=1), tmp_path / "run")
    assert torch.equal(torch.rand(1), expected)


def test_metrics_count_what_they_say(digits):
    config = replace(CONFIG, method="dense", epochs=1, lr=1e-30, batch_size=100)
    torch.manual_seed(0)
    training = Training(config, digits)
    with torch.no_grad():
        images = training.batches.normalise(digits.train_images)
        logits = training.model(images)
        test = training.model(training.batches.normalise(digits.test_images))
    metrics = next(_epochs(training))
    expected = torch.nn.functional.cross_entropy(logits, digits.train_labels)
    assert metrics.loss == pytest.approx(float(expected), rel=1e-5)
    hits = (logits.argmax(1) == digits.train_labels).float().mean()
    assert metrics.train_accuracy == pytest.approx(100 * float(hits), rel=1e-6)
    hits = (test.argmax(1) == digits.test_labels).float().mean()
    assert metrics.test_accuracy == pytest.approx(100 * float(hits), rel=1e-6)
    assert images.mean() == pytest.approx(0, abs=1e-5)
    assert images.std() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("freeze_at", "counts"), [(1.0, False), (0.5, True)])
def test_the_penalty_counts_once_the_ranks_stay(digits, freeze_at, counts):
    """Until then it would work against the truncation."""
    losses = []
    for weight in (0.0, 0.1):
        torch.manual_seed(0)
        config = replace(CONFIG, freeze_at=freeze_at, spectral_penalty=weight)
        losses.append([metrics.loss for metrics in _epochs(Training(config, digits))])
    assert (losses[0] != losses[1]) is counts


def test_bfloat16_rounds_all_passes_but_the_last_evaluation(digits):
    rounded, exact = (
        Training(replace(CONFIG, lr=1e-30, epochs=2, precision=precision), digits)
        for precision in ("bfloat16", "float32")
        if torch.manual_seed(0)
    )
    types = []
    rounded.model.head.register_forward_hook(
        lambda module, arguments, output: types.append((module.training, output.dtype))
    )
    losses = [[epoch.loss for epoch in _epochs(training)] for training in (rounded, exact)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert {kind for training, kind in types if training} == {torch.bfloat16}
    assert [kind for training, kind in types if not training] == [torch.bfloat16, torch.float32]
    assert {p.dtype for p in rounded.model.parameters()} == {torch.float32}
