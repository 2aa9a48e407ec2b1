"""Names in files, and links in folders, do not lead out of the run directory."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import tdlrt
from tdlrt.errors import CheckpointError, DataError, RunError
from tdlrt.files import write_atomically
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import load_data
from tdlrt_lab.reports.write import write_report
from tdlrt_lab.run.locks import exclusive
from tdlrt_lab.run.plots import save_figure
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.run.runner import run
from tdlrt_lab.sweep.attempts import work
from tdlrt_lab.sweep.plan import Sweep, SweepError

BAD_ROWS = (
    "",
    ".",
    "..",
    "../a",
    "a/b",
    "/a",
    "a\0b",
    "a\nb",
    "-a",
    ".a",
    "a\\b",
    "ä",
    "a b",
    3,
    "a" * 101,
)
OPTIONS = {"model": "lenet5", "data": "digits"}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_is_one_word(tmp_path, name):
    with pytest.raises(SweepError, match="it is the name of a directory"):
        Sweep(options=OPTIONS, rows={name: {}}).runs(tmp_path)


def test_values_of_a_grid_stay_in_its_directory(tmp_path):
    folders = ["../../outside", "/outside", "a\0b", "..", "x" * 300]
    for one in Sweep(options=OPTIONS, rows={"a": {"data_dir": folders}}).runs(tmp_path):
        for path in (one.directory.path, one.lock, one.failure):
            assert path.resolve().is_relative_to(tmp_path) and path.name.isprintable()
            assert len(path.name) < 100 and not path.exists()
    long = {"data_dir": ["x" * 100, "y"], "device": ["cpu"], "augment": ["standard", "none"]}
    with pytest.raises(SweepError, match="characters, expected at most 200, because it is"):
        Sweep(options=OPTIONS, rows={"b" * 80: long}).runs(tmp_path)


FOLDERS = ("checkpoints", "plots", "baseline", "tensorboard")
INNER = ("tensorboard/tdlrt", "baseline/checkpoints", "baseline/plots")


@pytest.mark.parametrize("folder", (*FOLDERS, *INNER))
def test_a_run_that_came_with_links_is_not_written_to(tmp_path, folder):
    directory, config = RunDirectory(tmp_path / "run"), RunConfig(**OPTIONS)
    (tmp_path / "outside").mkdir()
    directory.write_config(config)
    (tmp_path / "outside" / "events.out.tfevents.1").write_text("mine")
    (directory.path / folder).parent.mkdir(exist_ok=True)
    (directory.path / folder).symlink_to(tmp_path / "outside")
    with pytest.raises(RunError, match=rf"{folder}: is a link to .*outside, outside .*run"):
        directory.check_resume(config)
    with pytest.raises(RunError, match=rf"{folder}: is a link"):
        directory.check_new(overwrite=True)
    for change in (directory.clear, directory.clear_events):
        with pytest.raises(RunError, match=rf"{folder}: is a link"):
            change()
    left = [path.name for path in (tmp_path / "outside").rglob("*")]
    assert left == ["events.out.tfevents.1"]


def test_a_report_is_not_written_through_a_link(tmp_path):
    directory = RunDirectory(tmp_path / "runs" / "a")
    directory.write_config(RunConfig(**OPTIONS))
    (tmp_path / "outside").mkdir()
    (tmp_path / "runs" / "report").symlink_to(tmp_path / "outside")
    with pytest.raises(RunError, match=r"report/figures: is a link to .*outside/figures, outside"):
        write_report(tmp_path / "runs")
    assert not any((tmp_path / "outside").iterdir())


def test_a_figure_replaces_a_link(tmp_path):
    (tmp_path / "outside").write_text("mine")
    path = tmp_path / "loss.png"
    path.symlink_to(tmp_path / "outside")
    save_figure(Figure(), path)
    assert (tmp_path / "outside").read_text() == "mine"
    assert path.read_bytes().startswith(b"\x89PNG") and not path.is_symlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_lock_is_a_regular_file(tmp_path):
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match="its lock is not a regular file"):
            with exclusive(tmp_path / name):
                pass
    assert (tmp_path / "outside").read_text() == "mine"


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_report_on_a_full_disk_names_the_file(tmp_path, monkeypatch):
    RunDirectory(tmp_path / "a").write_config(RunConfig(**OPTIONS))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"report/tables\.md: cannot be written \(No space left"):
        write_report(tmp_path)


def test_a_sweep_on_a_full_disk_tries_every_run(tmp_path, monkeypatch):
    rows = {"a": {"method": "dense"}, "b": {"method": "dense", "epochs": 2}}
    runs = Sweep(options={**OPTIONS, "epochs": 1}, rows=rows).runs(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    events = []
    work(runs, events.append)
    failed = [event for event in events if event["event"] == "failed"]
    assert [event["run"] for event in failed] == ["a/seed0", "b/seed0"]
    for event in failed:
        assert "config.yaml: cannot be written (No space left on device)" in event["error"]
        assert "seed0.error.json: cannot be written (No space left" in event["error"]


def test_links_in_the_place_of_files_are_replaced(tmp_path):
    outside, path = tmp_path / "outside", tmp_path / "run" / "model"
    outside.write_text("mine")
    path.parent.mkdir()
    path.symlink_to(outside)
    write_atomically(path, lambda file: file.write(b"new"))
    assert (path.read_text(), outside.read_text()) == ("new", "mine")
    assert not path.is_symlink() and [one.name for one in path.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["a\0b", "a" * 300, "folder/" * 2000])
def test_names_that_no_file_has(tmp_path, name):
    path, model = tmp_path / name, nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="cannot be written"):
        tdlrt.save(model, path)
    with pytest.raises(CheckpointError, match=r"cannot be read|no such file"):
        tdlrt.load(path, model)
    assert not any(one.is_file() for one in tmp_path.rglob("*"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    for path in (tmp_path / "config.yaml", tmp_path / "model", folder / "1.png"):
        os.mkfifo(path)
    with pytest.raises(RunError, match="not a regular file"):
        RunDirectory(tmp_path).read_config()
    with pytest.raises(CheckpointError, match="is not a regular file"):
        tdlrt.load(tmp_path / "model", nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(DataError, match="not a regular file"):
        load_data("imagefolder", tmp_path)


def test_names_of_classes_are_no_paths(tmp_path):
    """Whatever the folders of a data set are called, a run writes into its own directory."""
    names = ["a\n\u202eb", os.fsdecode(b"c\xff"), "d" * 250, "..e", "%s{0}"]
    for part in ("train", "test"):
        for number, name in enumerate(names):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            pixels = np.full((8, 8, 3), 40 * number, np.uint8)
            for image in ("1.png", "2.png"):
                Image.fromarray(pixels).save(folder / image)
    before = files(tmp_path)
    config = RunConfig(
        model="lenet5", data="imagefolder", data_dir=str(tmp_path / "data"), image_size=8, epochs=1
    )
    run(config, tmp_path / "run")
    new = files(tmp_path) - before
    assert new and all(path.is_relative_to(tmp_path / "run") for path in new)
    assert not any(name in path.name for path in new for name in names)


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}
