import signal
import sys

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from tdlrt.errors import MissingExtraError
from tdlrt_lab.cli.app import run_app
from tdlrt_lab.cli.tensorboard import TensorBoardLog
from tdlrt_lab.config import RunConfig
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.run.runner import Interrupted, Observer, Observers, run

CONFIG = RunConfig(
    model="lenet5", data="digits", epochs=3, batch_size=256, tau=0.5, init_scale=1.0, freeze_at=0.7
)


class Stop(Observer):
    """Interrupt the run after so many steps."""

    def __init__(self, step):
        self.step = step

    def stepped(self, training):
        if training.step == self.step:
            signal.raise_signal(signal.SIGINT)


def points(directory, method):
    """Name of a scalar -> its (epoch, value), in the order in which they were written."""
    found = {}
    for file in sorted((directory.tensorboard / method).iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                point = event.step, value.tensor.float_val[0]
                found.setdefault(value.tag, []).append(point)
    return found


def logged_run(path, *observers, **options):
    with TensorBoardLog(str(path)) as log:
        run(CONFIG, path, observer=Observers(log, *observers), **options)
    return RunDirectory(path)


def test_scalars_of_run_and_baseline_are_those_of_the_metrics(tmp_path):
    directory = logged_run(tmp_path / "run", baseline=True)
    for method, history in (
        ("tdlrt", directory.read_metrics()),
        ("dense", directory.baseline.read_metrics()),
    ):
        found = points(directory, method)
        assert found["loss/train"] == [(m.epoch, pytest.approx(m.loss)) for m in history]
        for name in ("accuracy/train", "accuracy/test", "lr"):
            assert [epoch for epoch, _ in found[name]] == [1, 2, 3]
    assert not any(name.startswith("tdlrt/") for name in found)
    last = directory.read_metrics()[-1]
    found = points(directory, "tdlrt")
    assert found["tdlrt/compression"][-1] == (3, pytest.approx(last.compression))
    for layer, ranks in last.ranks.items():
        assert [found[f"tdlrt/rank/{layer}/{mode}"][-1][1] for mode in range(len(ranks))] == ranks


def test_a_resumed_run_has_every_point_once(tmp_path):
    with pytest.raises(Interrupted):
        logged_run(tmp_path / "run", Stop(8))  # in the second epoch
    directory = RunDirectory(tmp_path / "run")
    assert [epoch for epoch, _ in points(directory, "tdlrt")["lr"]] == [1]
    logged_run(tmp_path / "run", resume=True)
    for name, written in points(directory, "tdlrt").items():
        assert [epoch for epoch, _ in written] == [1, 2, 3], name


def test_a_run_may_be_resumed_with_it_and_overwritten_without(tmp_path):
    with pytest.raises(Interrupted):
        run(CONFIG, tmp_path / "run", observer=Stop(8))
    directory = logged_run(tmp_path / "run", resume=True)
    assert [epoch for epoch, _ in points(directory, "tdlrt")["lr"]] == [1, 2, 3]
    (directory.tensorboard / "notes.txt").touch()
    run(CONFIG, tmp_path / "run", overwrite=True)
    assert [file.name for file in directory.tensorboard.iterdir()] == ["notes.txt"]


def test_command_line(tmp_path, capsys):
    words = ["train", "lenet5", "--data", "digits", "--batch-size", "256", "--epochs", "1"]
    assert run_app([*words, "--quiet", "--tensorboard", "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr() == ("", "")
    assert len(points(RunDirectory(tmp_path / "run"), "tdlrt")["lr"]) == 1


def test_a_missing_extra_is_said_before_anything_is_done(tmp_path, monkeypatch, capsys):
    for module in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"--tensorboard needs .*tdlrt\[log\]"):
        TensorBoardLog(str(tmp_path / "run"))
    words = ["train", "lenet5", "--data", "digits", "--tensorboard"]
    assert run_app([*words, "--out", str(tmp_path / "run")]) == 1
    assert "tensorboard, which is not installed; run: pip install" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
