import json

import pytest

from tdlrt.errors import RunError
from tdlrt.files import write_atomically
from tdlrt_lab.config import RunConfig
from tdlrt_lab.run.locks import sole_owner
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


SUMMARY = {
    **{"model": "lenet5", "data": "digits", "method": "dense", "seed": 0, "layers": []},
    **{"accuracy": 1.0, "compression": 0.0, "network_compression": 0.0, "seconds": 1.0},
    **{
        "macs": 100,
        "dense_macs": 100,
        "parameters": 10,
        "network_parameters": 10,
        "network_dense_parameters": 10,
    },
}


@pytest.fixture
def finished(tmp_path):
    """A run directory with every file a run writes, a baseline, and one file of the user's."""
    for directory in (RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run").baseline):
        directory.write_config(CONFIG)
        directory.write_metrics([metrics(1)])
        directory.write_summary(SUMMARY)
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


WRONG_SUMMARIES = {
    "empty": ("{}", "no accuracy; expected the result of a run of this version"),
    "list": ("[]", "got list, expected an object"),
    "deep": ("[" * 100_000, "cannot read the result of a finished run"),
    "surrogate": (json.dumps(SUMMARY | {"model": "\ud800"}), "surrogates not allowed"),
    "huge": (json.dumps(SUMMARY | {"seconds": 10**400}), "seconds is 1000.*; expected a finite nu"),
    "seed": (json.dumps(SUMMARY | {"seed": "0"}), "seed is '0'; expected an integer from 0"),
    "layers": (json.dumps(SUMMARY | {"layers": [{}]}), r"layers is \[\{\}\]; expected name, shape"),
    "long": (" " * 2**22 + "{}", "more than 4,194,304 bytes"),
}


@pytest.mark.parametrize(("text", "message"), WRONG_SUMMARIES.values(), ids=WRONG_SUMMARIES)
def test_a_summary_that_no_run_writes(finished, text, message):
    finished.summary.write_text(text)
    with pytest.raises(RunError, match=rf"summary\.json: .*{message}"):
        finished.read_summary()


def test_checkpoints_of_the_user_are_left_alone(finished):
    names = ("previous-copy.pt", "previous-0.pt", "previous--1.pt", "previous-1.pt.mine")
    for name in (*names, "previous-1.pt", "previous-12.pt"):
        (finished.checkpoint.parent / name).write_bytes(b"mine")
    found = [path.name for path in finished.checkpoints]
    assert found == ["last.pt", "previous-1.pt", "previous-12.pt"]
    finished.clear()
    left = sorted(path.name for path in finished.checkpoint.parent.iterdir())
    assert left == sorted(names)


def test_parts_that_killed_runs_left_are_deleted_by_the_next_owner(finished):
    folders = [finished.path, finished.checkpoint.parent, finished.baseline.plots]
    parts = [folder / f"file.{'a' * 16}.part" for folder in folders]
    for part in parts:
        part.write_bytes(b"half")
    with sole_owner(finished, new=False):
        assert not any(part.exists() for part in parts)


def test_a_directory_that_cannot_be():
    with pytest.raises(RunError, match=r"out 'a\\x00b': contains a NUL"):
        RunDirectory("a\0b")


def test_broken_summary(finished):
    finished.summary.write_text('{"accuracy": ')
    with pytest.raises(RunError, match=r"summary\.json: cannot read the result of a finished run"):
        finished.read_summary()
