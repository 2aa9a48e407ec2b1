"""Text: the sources of the standard library, the GPT, and its training."""

import io
import math
import signal
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from tdlrt.errors import ConfigError, DataError, RunError
from tdlrt.surgery import factorize_
from tdlrt_lab.cli.display import RunDisplay, SweepDisplay
from tdlrt_lab.cli.screens import LineScreen
from tdlrt_lab.cli.terminal_tables import closing_line
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import load_data
from tdlrt_lab.data.stdlib import read_stdlib
from tdlrt_lab.data.text_data import CHARACTERS, TextData, windows
from tdlrt_lab.gpt import GPT
from tdlrt_lab.models import MODELS, build_model
from tdlrt_lab.run.batches import make_batches
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.run.runner import Interrupted, Observer, run
from tdlrt_lab.run.training import Training
from tdlrt_lab.sweep.execute import execute
from tdlrt_lab.sweep.plan import Sweep

CONTEXT = 16

# A start and a tolerance with which ranks move at once; 1,024 windows in an epoch of eight steps.
CONFIG = RunConfig(
    model="gpt", data="stdlib", epochs=2, batch_size=128, lr=0.01, tau=0.4, freeze_at=0.7, rank=0.8
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder of modules, of which 40 are taken."""
    folder = tmp_path_factory.mktemp("python")
    for number in range(40):
        (folder / f"m{number:02}.py").write_text(f"# {number}\n" + "x = [1, 2, 3]\n" * 80)
    for name, text in {
        "short.py": "x = 1\n",
        "long.py": "x" * 2**17,
        "umlaut.py": "ä" * 2000,
        "table.txt": "x" * 2000,
        "not-a-name.py": "x" * 2000,
        "test/inside.py": "x" * 2000,
        "site-packages/foreign.py": "x" * 2000,
    }.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(library):
    return read_stdlib("stdlib", CONTEXT, library)


@pytest.fixture
def small(monkeypatch, data):
    """A GPT of two blocks and width 16, on a few files."""
    build = {"gpt": lambda shape, classes: GPT(classes, *shape, width=16, layers=2, heads=2)}
    monkeypatch.setattr("tdlrt_lab.models.MODELS", MODELS | build)
    monkeypatch.setitem(run.__globals__, "load_data", lambda *args, **options: data)
    return data


def first_lines(files):
    return [bytes(file.tolist()).split(b"\n")[0].decode() for file in files]


def test_every_tenth_file_in_the_order_of_paths_is_a_test_file(data):
    assert first_lines(data.test_files) == ["# 9", "# 19", "# 29", "# 39"]
    assert first_lines(data.train_files) == [f"# {n}" for n in range(40) if n % 10 != 9]
    assert (data.split, data.input_shape, len(data.classes)) == ("test", (CONTEXT,), CHARACTERS)


def test_library_that_is_not_there_as_files(tmp_path):
    (tmp_path / "one.py").write_text("x" * 2000)
    with pytest.raises(DataError, match=r"holds 1 modules .* expected at least 20; use a Python"):
        read_stdlib("stdlib", CONTEXT, tmp_path)


def test_standard_library_of_this_python():
    data, again = load_data("stdlib"), load_data("stdlib")
    assert data.record() == again.record()
    assert sum(map(len, data.train_files)) > 2**21
    assert all(int(file.max()) < CHARACTERS for file in (*data.train_files, *data.test_files))


def test_record_tells_texts_apart(data):
    record = data.record()
    assert record["training"]["files"] == 36 and record["test"]["files"] == 4
    first, *others = data.train_files
    moved = replace(
        data, train_files=(torch.cat([first, others[0][:1]]), others[0][1:], *others[1:])
    )
    assert moved.record()["training"]["characters"] == record["training"]["characters"]
    assert moved.record()["training"]["sha256"] != record["training"]["sha256"]


def test_windows_and_the_characters_that_follow():
    text = torch.arange(10, dtype=torch.uint8)
    inputs, labels = windows(text, torch.tensor([0, 6]), 3)
    assert inputs.tolist() == [[0, 1, 2], [6, 7, 8]]
    assert labels.tolist() == [[1, 2, 3], [7, 8, 9]]
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("length", [5, 6, 9, 21, 5000])
def test_held_out_windows_reach_from_the_first_character_to_the_last(length):
    text = torch.arange(length).remainder(100).to(torch.uint8)
    data = TextData(name="x", train_files=(text,), test_files=(text,), context=4)
    inputs, labels = data.held_out()
    assert len(inputs) == min(512, (length - 1) // 4)
    assert inputs[0].tolist() == [0, 1, 2, 3]
    if len(inputs) > 1:
        assert labels[-1, -1] == text[-1]


def test_validation_files_are_carved_from_the_training_files(data):
    held = data.hold_out(0.25, 3)
    assert (len(held.train_files), len(held.test_files), held.split) == (27, 9, "validation")
    both = first_lines(held.train_files) + first_lines(held.test_files)
    assert sorted(both) == sorted(first_lines(data.train_files))
    assert first_lines(data.hold_out(9, 4).test_files) != first_lines(held.test_files)
    with pytest.raises(DataError, match=r"validation 36: 36 of the 36 training files"):
        data.hold_out(36, 0)


def test_windows_of_an_epoch_depend_on_seed_and_epoch_alone(data):
    def order(seed, epoch):
        batches = make_batches(replace(CONFIG, seed=seed), data, torch.device("cpu"))
        return batches.order(epoch)

    assert torch.equal(order(0, 1), order(0, 1))
    assert not torch.equal(order(0, 1), order(0, 2))
    assert not torch.equal(order(0, 1), order(1, 1))
    assert len(order(0, 0)) == 1024
    assert int(order(0, 0).max()) <= sum(map(len, data.train_files)) - CONTEXT - 1


def test_gpt_has_six_layers_of_width_256():
    model = build_model("gpt", (128,), CHARACTERS)
    report = factorize_(model, rank=0.5, dry_run=True)
    assert sum(row.dense_parameters for row in report.factorized) == 6 * 12 * 256**2
    assert {row.name for row in report.factorized} == {
        f"blocks.{number}.{name}" for number in range(6) for name in ("qkv", "proj", "fc1", "fc2")
    }
    assert [row.name for row in report.skipped if row.note == "output head"] == ["head"]


def test_logits_depend_on_no_later_character():
    torch.manual_seed(0)
    model = GPT(CHARACTERS, 8, width=16, layers=2, heads=2)
    text = torch.randint(CHARACTERS, (3, 8), dtype=torch.uint8)
    other = text.clone()
    other[:, 5] = (other[:, 5] + 1) % CHARACTERS
    one, two = model(text), model(other)
    assert one.shape == (3, CHARACTERS, 8)
    torch.testing.assert_close(one[..., :5], two[..., :5])
    assert (one[..., 5:] != two[..., 5:]).flatten(0, 1).any(0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "digits"}, r"model 'gpt' with data 'digits': .* choose one of stdlib"),
        ({"model": "lenet5"}, r"model 'lenet5' with data 'stdlib': .* choose one of cifar10"),
        ({"augment": "standard"}, r"augment 'standard': not used with data stdlib, only with"),
        ({"train_images": 100}, r"train_images 100: not used with data stdlib"),
        ({"image_size": 32}, r"image_size 32: not used with data stdlib"),
        ({"method": "structured", "budget": 0.5}, r"method 'structured' with data 'stdlib'"),
    ],
)
def test_options_of_images_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(**{"model": "gpt", "data": "stdlib", **options})


def test_typed_folder_of_data_is_refused():
    with pytest.raises(ConfigError, match=r"data_dir 'here': not used with data stdlib"):
        RunConfig.given(model="gpt", data="stdlib", data_dir="here")


@pytest.mark.parametrize("options", [{}, {"budget": 0.5}, {"method": "dense"}])
def test_transformers_are_trained_by_adamw(options):
    assert RunConfig(model="gpt", data="stdlib", **options).optimizer == "adamw"


def test_networks_of_images_and_of_text_are_told_apart():
    with pytest.raises(DataError, match=r"input_shape \(1, 8, 8\): gpt expects \(context,\)"):
        build_model("gpt", (1, 8, 8), 10)
    with pytest.raises(DataError, match=r"input_shape \(128,\): lenet5 expects \(channels"):
        build_model("lenet5", (128,), 10)


def test_bits_per_character_are_the_cross_entropy(small):
    training = Training(replace(CONFIG, epochs=1), small)
    metrics = next(training.epochs(lambda: False, lambda training: None))
    inputs, labels = small.held_out()
    training.model.eval()
    with torch.no_grad():
        log_shares = torch.log_softmax(training.model(inputs).double(), dim=1)
    nats = -log_shares.gather(1, labels[:, None]).mean()
    assert metrics.bits_per_character == pytest.approx(float(nats) / math.log(2), rel=1e-5)
    hits = (log_shares.argmax(1) == labels).double().mean()
    assert metrics.accuracy == pytest.approx(100 * float(hits))


def test_training_loss_and_accuracy_are_means_over_characters(small):
    config = replace(CONFIG, epochs=1, batch_size=1024, lr=1e-9, method="dense", tau=None)
    torch.manual_seed(0)
    training = Training(config, small)
    inputs, labels = training.batches.batch(training.batches.order(0))
    with torch.no_grad():
        logits = training.model(inputs)
    metrics = next(training.epochs(lambda: False, lambda training: None))
    assert metrics.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    hits = (logits.argmax(1) == labels).double().mean()
    assert metrics.train_accuracy == pytest.approx(100 * float(hits), abs=0.1)


class StopAfter(Observer):
    """Send a signal to this process after a number of steps."""

    def __init__(self, step):
        self.step = step

    def stepped(self, training):
        if training.step == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_interrupted_and_resumed_equals_uninterrupted(small, tmp_path, integrator):
    config = replace(CONFIG, integrator=integrator)
    whole, parts = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "parts")
    summary = run(config, whole.path)
    for number, step in enumerate((3, 11)):
        with pytest.raises(Interrupted):
            run(config, parts.path, resume=number > 0, observer=StopAfter(step))
    run(config, parts.path, resume=True)
    assert _without_times(parts) == _without_times(whole)
    assert parts.model.read_bytes() == whole.model.read_bytes()
    first, last = whole.read_metrics()
    assert first.ranks != Training(config, small).ranks
    assert summary["bits_per_character"] == last.bits_per_character
    assert {path.name for path in whole.plots.iterdir()} == {
        *("bits_per_character.png", "loss.png", "compression.png", "ranks.png")
    }


def _without_times(directory):
    return [replace(metrics, seconds=0.0) for metrics in directory.read_metrics()]


def test_summary_of_a_run_and_its_baseline(small, tmp_path):
    config = replace(CONFIG, epochs=1)
    summary = run(config, tmp_path, baseline=True)
    directory = RunDirectory(tmp_path)
    dense = directory.baseline.read_summary()
    assert summary["dense_bits_per_character"] == dense["bits_per_character"]
    assert summary["text"] == small.record() and "images" not in summary
    assert directory.read_summary() == summary
    bits, best = summary["bits_per_character"], dense["bits_per_character"]
    assert closing_line(summary).startswith(f"bits per character {bits:.3f} (dense {best:.3f}),")


def test_run_on_other_text_is_not_resumed(small, tmp_path, monkeypatch):
    run(replace(CONFIG, epochs=1), tmp_path)
    other = replace(small, train_files=small.train_files[1:])
    monkeypatch.setitem(run.__globals__, "load_data", lambda *args, **options: other)
    with pytest.raises(RunError, match=r"training files: 36, characters: .* \(now files: 35"):
        run(replace(CONFIG, epochs=1), tmp_path, resume=True)


@pytest.mark.parametrize(
    "method", ["tucker", "matrix", "matrix_dlrt", "magnitude", "snip", "grasp", "posthoc"]
)
def test_methods_train_a_gpt(small, tmp_path, method):
    config = RunConfig(
        model="gpt", data="stdlib", epochs=1, batch_size=256, method=method, budget=0.6, lr=0.01
    )
    summary = run(config, tmp_path)
    assert summary["compression"] >= 0.4 - 1e-9
    assert summary["bits_per_character"] < 7.5


def test_sweep_shows_bits_per_character(small, tmp_path):
    options = {"model": "gpt", "data": "stdlib", "epochs": 1, "batch_size": 512}
    runs = Sweep(options=options, rows={"dense": {"method": "dense"}}).runs(tmp_path)
    console = Console(file=io.StringIO(), width=200)
    display = SweepDisplay(LineScreen(console), runs)
    execute(runs, display.show)
    display.close("done")
    text = console.file.getvalue()
    bits = runs[0].directory.read_summary()["bits_per_character"]
    assert f"dense/seed0: bits per character {bits:.3f}, compression 0.0 %" in text
    assert "bits per character" in text.split("row")[1] and "accuracy" not in text


def test_lines_of_a_run_show_bits_per_character(small, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    display = RunDisplay(LineScreen(console), "there")
    config = replace(CONFIG, epochs=1, method="dense", tau=None)
    summary = run(config, tmp_path, observer=display)
    text = console.file.getvalue()
    assert "gpt (dense) on stdlib: " in text and "test characters in windows of 16" in text
    bits = summary["bits_per_character"]
    assert f"bits per character {bits:6.3f}" in text
    assert f"\nbits per character {bits:.3f} in " in text
