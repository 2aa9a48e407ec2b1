"""What a run leaves when it dies, when the disk is full, and when its numbers are not finite."""

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tdlrt.errors import ConfigError, NonFiniteError, RunError
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import load_data
from tdlrt_lab.run import checkpoint
from tdlrt_lab.run.batches import ImageBatches
from tdlrt_lab.run.checkpoint import Checkpoints
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.run.runner import Interrupted, Observer, run
from tdlrt_lab.run.training import Training

# Two epochs of six steps with everything that a step depends on; ranks move at once.
CONFIG = RunConfig(
    model="lenet5",
    data="digits",
    epochs=2,
    batch_size=256,
    tau=0.5,
    init_scale=1.0,
    augment="standard",
    warmup=0.2,
)


class Killed(BaseException):
    """Nothing is tidied up after it, as after kill -9."""


class At(Observer):
    """Do something after a step; remember warnings."""

    def __init__(self, step=0, action=None):
        self.step, self.action = step, action
        self.warnings = []

    def stepped(self, training):
        if training.step == self.step:
            self.action()

    def warned(self, message):
        self.warnings.append(message)


def kill():
    raise Killed


def killed_at(step, path, checkpoints=None, config=CONFIG):
    with pytest.raises(Killed):
        run(config, path, checkpoints=checkpoints, observer=At(step, kill))
    return RunDirectory(path)


def steps_of(directory):
    states = (torch.load(path, weights_only=True) for path in directory.checkpoints)
    return [6 * state["epoch"] + state["batch"] for state in states]


def outcome(directory):
    metrics = [replace(one, seconds=0.0) for one in directory.read_metrics()]
    return metrics, directory.model.read_bytes()


def contents(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcome of the run that nothing happens to."""
    directory = RunDirectory(tmp_path_factory.mktemp("whole"))
    run(CONFIG, directory.path)
    return outcome(directory)


def test_every_so_many_steps(tmp_path, whole):
    directory = killed_at(10, tmp_path, Checkpoints(steps=4))
    assert steps_of(directory) == [8]
    run(CONFIG, tmp_path, resume=True)
    assert outcome(directory) == whole


def test_every_so_many_minutes(tmp_path, whole, monkeypatch):
    minutes = iter(range(1000))  # every look at the clock is a minute later
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: 60.0 * next(minutes))
    directory = killed_at(6, tmp_path, Checkpoints(minutes=3, keep=9))
    assert steps_of(directory) == [3]
    run(CONFIG, tmp_path, resume=True)
    assert outcome(directory) == whole


def test_the_last_ones_are_kept(tmp_path):
    directory = killed_at(11, tmp_path, Checkpoints(steps=2, keep=3))
    assert [path.name for path in directory.checkpoints] == [
        "last.pt",
        "previous-1.pt",
        "previous-2.pt",
    ]
    assert steps_of(directory) == [10, 8, 6]
    with pytest.raises(Killed):
        run(CONFIG, tmp_path, resume=True, checkpoints=Checkpoints(steps=1), observer=At(12, kill))
    assert steps_of(directory) == [11]
    run(CONFIG, tmp_path, resume=True)
    assert steps_of(directory) == [12]


def test_an_epoch_is_stored_once(tmp_path):
    assert steps_of(killed_at(7, tmp_path, Checkpoints(steps=3, keep=9))) == [6, 3]


def test_dropout_goes_on_with_the_numbers_it_would_have_drawn(tmp_path, monkeypatch):
    def network(*arguments):
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Dropout(), torch.nn.Linear(32, 10)
        )

    monkeypatch.setattr("tdlrt_lab.run.training.build_model", network)
    run(CONFIG, tmp_path / "whole")
    directory = killed_at(10, tmp_path / "parts", Checkpoints(steps=4))
    run(CONFIG, tmp_path / "parts", resume=True)
    assert outcome(directory) == outcome(RunDirectory(tmp_path / "whole"))


def truncate(content):
    return content[: len(content) // 2]


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda content: b""])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, whole, damage):
    directory = killed_at(10, tmp_path, Checkpoints(steps=4, keep=2))
    last = directory.checkpoint
    broken = damage(last.read_bytes())
    last.write_bytes(broken)
    observer = At()
    run(CONFIG, tmp_path, resume=True, checkpoints=Checkpoints(keep=2), observer=observer)
    assert outcome(directory) == whole
    (warning,) = observer.warnings
    assert warning.startswith(f"{last}: not a readable checkpoint (")
    assert warning.endswith("; renamed to last.pt.damaged, continuing from previous-1.pt")
    assert last.with_name("last.pt.damaged").read_bytes() == broken
    run(CONFIG, tmp_path, overwrite=True, observer=At())
    assert not last.with_name("last.pt.damaged").exists()


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path):
    directory = killed_at(10, tmp_path, Checkpoints(steps=4, keep=2))
    for path in directory.checkpoints:
        path.write_bytes(truncate(path.read_bytes()))
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r"last\.pt: not a readable checkpoint .*--overwrite"):
        run(CONFIG, tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_death_between_the_two_renamings_loses_nothing(tmp_path, whole):
    directory = killed_at(10, tmp_path, Checkpoints(steps=4, keep=2))
    directory.checkpoint.rename(directory.checkpoint.with_name("previous-1.pt"))
    run(CONFIG, tmp_path, resume=True)
    assert outcome(directory) == whole


def test_a_run_that_died_over_its_first_file_is_started_again(tmp_path):
    part = tmp_path / f"config.yaml.{'0' * 16}.part"
    part.write_text("model: le")
    killed_at(1, tmp_path)
    assert not part.exists()


FILES = ("new.pt", "metrics.jsonl", "model.safetensors", "summary.json", "loss.png")


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_later(tmp_path, whole, monkeypatch, name):
    directory, move = killed_at(8, tmp_path, Checkpoints(steps=4)), os.replace
    before = contents(tmp_path)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def replace_unless_full(source, target):
        return full() if Path(target).name == name else move(source, target)

    with monkeypatch.context() as patch:
        if name.endswith(".png"):
            patch.setattr("tdlrt_lab.run.plots._draw_loss", full)
        patch.setattr(os, "replace", replace_unless_full)
        with pytest.raises(
            RunError, match=r"cannot be written \(No space left on device\); .*--res"
        ):
            run(CONFIG, tmp_path, resume=True)
    assert not list(tmp_path.rglob("*.part"))
    if name == "new.pt":
        assert contents(tmp_path) == before
    run(CONFIG, tmp_path, resume=True)
    assert outcome(directory) == whole


def test_a_file_system_that_refuses_the_end_of_a_checkpoint(tmp_path, whole):
    """What torch makes of an error of the system in the middle of its archive."""
    resource = pytest.importorskip("resource")
    directory = killed_at(10, tmp_path, Checkpoints(steps=4))
    before, (_, hard) = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RunError, match=r"last\.pt: cannot be written \(File too large\)"):
            run(CONFIG, tmp_path, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert contents(tmp_path) == before
    run(CONFIG, tmp_path, resume=True)
    assert outcome(directory) == whole


@pytest.fixture
def not_a_number(monkeypatch):
    """Make the images of some steps, counted from 0, NaN."""
    step, batch, broken = Training._step, ImageBatches.batch, set()

    def images_and_labels(self, index, moves=None):
        images, labels = batch(self, index, moves)
        return images * torch.nan, labels

    def maybe_broken_step(self, index, moves):
        with monkeypatch.context() as patch:
            if self.step in broken:
                patch.setattr(ImageBatches, "batch", images_and_labels)
            step(self, index, moves)

    def at(*steps):
        broken.clear()
        broken.update(steps)

    monkeypatch.setattr(Training, "_step", maybe_broken_step)
    return at


METHODS = {
    "parallel": CONFIG,
    "bug": replace(CONFIG, integrator="bug"),
    "dense": replace(CONFIG, method="dense", tau=None, lr=None),
    "batch norm": RunConfig(
        model="rescnn", data="digits", epochs=2, batch_size=256, train_images=1300, rank=0.1
    ),
}


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, not_a_number, config):
    not_a_number(2, 3, 7)
    config = replace(config, skip_nonfinite=2)
    directory, parts = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "parts")
    summary = run(config, directory.path)
    assert summary["skipped_steps"] == 3
    assert [metrics.skipped_steps for metrics in directory.read_metrics()] == [2, 3]
    assert all(0 < metrics.loss < 3 for metrics in directory.read_metrics())
    with pytest.raises(Interrupted):
        stop = At(3, lambda: signal.raise_signal(signal.SIGTERM))
        run(config, parts.path, observer=stop)
    run(config, parts.path, resume=True)
    assert outcome(parts) == outcome(directory)


def test_a_skipped_step_changes_no_weight_and_no_running_statistic(not_a_number):
    not_a_number(1)
    training = Training(replace(METHODS["batch norm"], skip_nonfinite=1), load_data("digits"))
    states = []

    def keep(training):
        states.append({name: t.clone() for name, t in training.model.state_dict().items()})

    next(training.epochs(lambda: False, keep))
    first, skipped, third = states[:3]
    assert all(torch.equal(first[name], skipped[name]) for name in first)
    assert any(
        not torch.equal(skipped[n], third[n]) for n in first if first[n].shape == third[n].shape
    )


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_after_the_limit_the_last_good_state_is_on_the_disk(tmp_path, not_a_number, config):
    not_a_number(3, 4, 5)
    config, often = replace(config, skip_nonfinite=2), Checkpoints(steps=1)
    with pytest.raises(
        NonFiniteError,
        match=r"step 6 of 12 after 2 skipped steps: .*; the last good state is in .*last\.pt",
    ):
        run(config, tmp_path, checkpoints=often)
    directory = RunDirectory(tmp_path)
    assert steps_of(directory) == [3]
    state = torch.load(directory.checkpoint, weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())
    not_a_number()
    assert run(config, tmp_path, resume=True)["skipped_steps"] == 0


def test_a_stop_does_not_begin_the_count_anew(tmp_path, not_a_number):
    not_a_number(2, 3, 4)
    config, stop = replace(CONFIG, skip_nonfinite=2), lambda: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        run(config, tmp_path, observer=At(4, stop))
    with pytest.raises(NonFiniteError, match=r"step 5 of 12 after 2 skipped steps"):
        run(config, tmp_path, resume=True)


def test_weights_that_are_not_finite_are_never_stored(tmp_path):
    class Poison(Observer):
        def stepped(self, training):
            if training.step == 5:
                with torch.no_grad():
                    training.model.head.weight[0, 0] = torch.inf

    with pytest.raises(
        NonFiniteError, match=r"infinite values in head\.weight; .*; the last good state is in "
    ):
        run(CONFIG, tmp_path, checkpoints=Checkpoints(steps=1), observer=Poison())
    assert steps_of(RunDirectory(tmp_path)) == [4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"checkpoint_steps 0: expected at least 1 step"),
        ({"minutes": 0.0}, r"checkpoint_minutes 0\.0: expected a positive number"),
        ({"minutes": float("nan")}, r"checkpoint_minutes nan: expected a positive number"),
        ({"keep": 0}, r"keep 0: expected at least 1 checkpoint"),
    ],
)
def test_ranges_of_checkpoints(options, message):
    with pytest.raises(ConfigError, match=message):
        Checkpoints(**options)
    with pytest.raises(
        ConfigError, match=r"skip_nonfinite -1: expected a number of steps, at least 0"
    ):
        replace(CONFIG, skip_nonfinite=-1)
