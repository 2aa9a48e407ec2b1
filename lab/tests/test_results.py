import json

import pytest

from tdlrt.errors import RunError
from tdlrt.files import write_atomically
from tdlrt_lab.config import RunConfig
from tdlrt_lab.run.metrics import EpochMetrics
from tdlrt_lab.run.results import RunDirectory

CONFIG = RunConfig(model="lenet5", data="digits")


def metrics(epoch):
    return EpochMetrics(
        epoch=epoch,
        loss=1 / epoch,
        train_accuracy=50.0,
        test_accuracy=40.0,
        compression=0.5,
        network_compression=0.4,
        parameters=100,
        ranks={"conv1": [2, 1, 5, 5]},
        lr=0.1,
        seconds=1.5,
    )


@pytest.fixture
def finished(tmp_path):
    """A run directory with every file a run writes, a baseline, and one file of the user's."""
    for directory in (RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run").baseline):
        directory.write_config(CONFIG)
        directory.write_metrics([metrics(1)])
        directory.write_summary({"accuracy": 1.0})
        write_atomically(directory.checkpoint, lambda file: file.write(b"x"))
        write_atomically(directory.model, lambda file: file.write(b"x"))
        for name in ("accuracy", "loss", "compression", "ranks"):
            write_atomically(directory.plots / f"{name}.png", lambda file: file.write(b"x"))
    return RunDirectory(tmp_path / "run")


def test_new_and_empty_directories_are_claimed(tmp_path):
    RunDirectory(tmp_path / "a" / "b").check_new(overwrite=False)
    assert (tmp_path / "a" / "b").is_dir()
    RunDirectory(tmp_path / "a" / "b").check_new(overwrite=True)


def test_a_run_is_not_replaced_unasked(finished):
    with pytest.raises(RunError, match=r"already contains a run; continue it with --resume"):
        finished.check_new(overwrite=False)
    finished.check_new(overwrite=True)
    assert finished.summary.exists()  # claiming deletes nothing


def test_files_of_the_user_are_no_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"contains files, but not a run of tdlrt"):
        RunDirectory(tmp_path).check_new(overwrite=True)
    (tmp_path / "config.yaml").write_text("theme: dark\n")
    with pytest.raises(RunError, match=r"config\.yaml: not the configuration of a run"):
        RunDirectory(tmp_path).check_new(overwrite=True)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file.run: cannot be written \(Not a directory\)"):
        RunDirectory(tmp_path / "file" / "run").check_new(overwrite=False)


def test_clear_deletes_what_a_run_wrote_and_nothing_else(finished):
    mine = finished.path / "plots" / "mine.txt"
    mine.write_text("")
    finished.clear()
    assert [path for path in finished.path.rglob("*") if path.is_file()] == [mine]
    mine.unlink()
    finished.clear()
    assert list(finished.path.iterdir()) == []


def test_resume_wants_a_run_with_the_same_options(finished, tmp_path):
    finished.check_resume(CONFIG)
    other = RunConfig(model="lenet5", data="digits", tau=0.2, seed=3)
    with pytest.raises(RunError, match=r"tau 0\.1 \(now 0\.2\), seed 0 \(now 3\)"):
        finished.check_resume(other)
    with pytest.raises(RunError, match=r"contains no run to resume"):
        RunDirectory(tmp_path / "none").check_resume(CONFIG)
    finished.config.write_bytes(b"\xff\xfe: {")
    with pytest.raises(RunError, match=r"config\.yaml: cannot be read"):
        finished.check_resume(CONFIG)


def test_metrics_are_read_as_they_were_written(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_metrics([metrics(1), metrics(2), metrics(3)])
    assert directory.read_metrics() == [metrics(1), metrics(2), metrics(3)]
    assert json.loads(directory.metrics.read_text().splitlines()[2])["loss"] == 1 / 3


def test_broken_summary(finished):
    finished.summary.write_text('{"accuracy": ')
    with pytest.raises(RunError, match=r"summary\.json: cannot read the result of a finished run"):
        finished.read_summary()
