"""When a run directory is refused: another process uses it, its run diverged, its data differ."""

import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from tdlrt.errors import NonFiniteError, RunError, TdlrtError
from tdlrt_lab.config import RunConfig
from tdlrt_lab.options import DEPENDS
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.run.runner import Observer, run

CONFIG = RunConfig(model="lenet5", data="digits", epochs=1, batch_size=256, method="dense")


@pytest.fixture
def other_process(tmp_path):
    """A process that trains into `tmp_path/run`, once it has begun."""
    words = [sys.executable, "-m", "tdlrt_lab", "train", "lenet5", "--data", "digits"]
    words += ["--epochs", "10000", "--quiet", "--out", str(tmp_path / "run")]
    with subprocess.Popen(words) as process:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.05)
        yield process
        process.kill()


def test_a_run_directory_has_one_owner_who_may_be_killed(other_process, tmp_path):
    directory = RunDirectory(tmp_path / "run")
    before = directory.read_config()
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(RunError, match=r"run: another process is writing to it; wait"):
            run(CONFIG, directory.path, **options)
    with pytest.raises(RunError, match=r"baseline: another process is writing to it; wait"):
        run(CONFIG, directory.path / "baseline")
    assert other_process.poll() is None
    assert directory.read_config() == before
    other_process.kill()
    other_process.wait()
    run(CONFIG, directory.path, overwrite=True)
    assert directory.read_config() == CONFIG.to_dict()


def test_the_lock_of_a_directory_from_elsewhere_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(RunError, match=r"run: cannot be written"):
        run(CONFIG, tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "text"


def test_resuming_nothing_makes_no_directory(tmp_path):
    with pytest.raises(RunError, match=r"contains no run to resume"):
        run(CONFIG, tmp_path / "a" / "run", resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_diverged_at_once_makes_way(tmp_path, resume):
    directory = RunDirectory(tmp_path / "run")
    with pytest.raises(NonFiniteError, match=r"nothing was stored yet"):
        run(replace(CONFIG, lr=1e20), directory.path)
    assert "NaN or infinite" in directory.diverged.read_text()
    run(CONFIG, directory.path, resume=resume)
    assert directory.read_config() == CONFIG.to_dict()
    assert directory.summary.exists() and not directory.diverged.exists()


def test_a_run_that_diverged_later_says_what_to_do(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    run(CONFIG, directory.path)
    directory.summary.unlink()
    directory.write_divergence("step 7 of 12: NaN")
    with pytest.raises(RunError, match=r"diverged; its last good .*last\.pt; .*--overwrite"):
        run(replace(CONFIG, lr=1e-3), directory.path)
    run(replace(CONFIG, lr=1e-3), directory.path, overwrite=True)
    assert not directory.diverged.exists()


@pytest.fixture
def listener():
    """An observer with the text of all warnings."""

    class Listener(Observer):
        told = ""

        def warned(self, message):
            self.told += message

    return Listener()


@pytest.fixture
def write_mnist(write_parquet, tmp_path):
    """Write so many training images, of which the first is one grey level."""

    def write(count, grey=0):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
        images[0] = grey
        for part, some in (("train", images), ("test", images[:4])):
            write_parquet("mnist", part, list(some), [n % 10 for n in range(len(some))])
        return replace(CONFIG, data="mnist", data_dir=str(tmp_path), batch_size=8, epochs=2)

    return write


def test_a_run_goes_on_with_the_data_it_began_with(write_mnist, tmp_path):
    directory, config = RunDirectory(tmp_path / "run"), write_mnist(16)
    run(config, directory.path)
    summary = directory.read_summary()
    assert summary["images"]["training"]["images"] == 16
    assert len(summary["images"]["test"]["sha256"]) == 64
    directory.summary.unlink()
    before = directory.checkpoint.read_bytes()
    write_mnist(24)
    with pytest.raises(
        RunError, match=r"different data, training images: 16 .* \(now images: 24 .*its own"
    ):
        run(config, directory.path, resume=True)
    write_mnist(16, grey=1)
    with pytest.raises(RunError, match=r"training images: 16 with digest .*, test images: 4 with"):
        run(config, directory.path, resume=True)
    assert directory.checkpoint.read_bytes() == before
    write_mnist(16)
    assert run(config, directory.path, resume=True)["images"] == summary["images"]


def test_a_run_without_a_record_of_its_data_is_resumed_with_a_warning(
    write_mnist, tmp_path, listener
):
    directory, config = RunDirectory(tmp_path / "run"), write_mnist(16)
    run(config, directory.path)
    directory.summary.unlink()
    directory.data.unlink()
    run(config, directory.path, resume=True, observer=listener)
    assert "nothing tells what data the run there was trained on" in listener.told
    assert directory.data.exists()
    listener.told = ""
    run(config, directory.path, resume=True, observer=listener)
    assert listener.told == ""


@pytest.mark.parametrize("finished", [True, False])
def test_a_baseline_goes_on_with_the_data_it_began_with(write_mnist, tmp_path, finished):
    directory, config = RunDirectory(tmp_path / "run"), write_mnist(16)
    config = replace(config, method="tucker")
    run(config, directory.path)
    write_mnist(16, grey=1)
    baseline = replace(config, method="dense", lr=DEPENDS)
    run(baseline, directory.baseline.path)
    if not finished:
        directory.baseline.summary.unlink()
    write_mnist(16)
    with pytest.raises(RunError, match=r"baseline: the run there was trained on different data"):
        run(config, directory.path, resume=True, baseline=True)


def test_what_is_refused_leaves_no_directory(write_mnist, tmp_path):
    new, empty = tmp_path / "a" / "b" / "run", tmp_path / "empty"
    empty.mkdir()
    config = write_mnist(16)
    before = sorted(tmp_path.rglob("*"))
    for wrong in (
        replace(config, validation=16),
        replace(config, train_images=17),
        replace(config, data_dir=str(tmp_path / "nowhere")),
        replace(config, method="tucker", rank={"conv1": (1, 1)}),
    ):
        for path in (new, empty):
            with pytest.raises(TdlrtError):
                run(wrong, path)
            assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "a").mkdir()  # only what the run created is deleted
    with pytest.raises(TdlrtError):
        run(wrong, new)
    assert list((tmp_path / "a").iterdir()) == []
    run(config, new)
    assert RunDirectory(new).lock.exists()


def test_a_broken_record_of_the_data_is_an_error(write_mnist, tmp_path):
    directory, config = RunDirectory(tmp_path / "run"), write_mnist(16)
    run(config, directory.path)
    for text in ("[]", "{", '{"training": 3}'):
        directory.data.write_text(text)
        with pytest.raises(RunError, match=r"data\.json|different data"):
            run(config, directory.path, resume=True)


def test_a_batch_that_is_larger_than_the_training_set_is_said(write_mnist, tmp_path, listener):
    run(replace(write_mnist(16), batch_size=17), tmp_path / "run", observer=listener)
    assert listener.told.startswith("a batch of 17 images (--batch-size) is larger than an epo")
    listener.told = ""
    run(replace(write_mnist(16), batch_size=16), tmp_path / "other", observer=listener)
    assert listener.told == ""
