"""A short run of programs/fuzz.py: files that are nearly right, for every loader."""

import json
import random
import signal
import warnings

import pytest

INPUTS = 40


NAMES = [
    *("model", "checkpoint", "plain", "sweep", "config", "metrics", "summary", "data", "failure"),
    *("results", "description", "parquet", "imagefolder"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_loader_reads_a_file_or_says_what_is_wrong_with_it(tmp_path, script, name):
    fuzz = script("fuzz")
    (tmp_path / "inside").mkdir()
    loader = fuzz.LOADERS[name](tmp_path / "inside")
    loader.path.write_bytes(loader.samples[0])
    loader.load()
    watch = fuzz.Watch(tmp_path / "inside")  # not installed: it would stay for all tests
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = [
            fuzz.changed(loader, watch, random.Random(f"test/{name}/{number}"))
            for number in range(INPUTS)
        ]
    assert set(outcomes) <= {"accepted", "refused"}
    assert outcomes.count("refused") > INPUTS // 4
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


@pytest.fixture
def bounded(script):
    """Raise an error if a test reads a file for too long."""
    fuzz = script("fuzz")
    before = signal.signal(signal.SIGALRM, fuzz.hang)
    yield fuzz
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_wrong_file(tmp_path, bounded, script, name):
    loader, kinds = bounded.LOADERS[name](tmp_path), script("kinds")
    loader.path.write_bytes(loader.samples[0])
    loader.load()
    watch, outcomes = bounded.Watch(tmp_path), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, put in bounded.kinds_of(loader):
            remove(loader.path)
            put(loader.path)
            signal.alarm(4 * bounded.SECONDS)  # the machine may be busy
            outcomes[kind] = bounded.attempt(loader, watch)
            signal.alarm(0)
    faults = {kind: o for kind, o in outcomes.items() if o not in ("accepted", "refused")}
    assert not faults
    assert outcomes["a link"] == "accepted"
    harmless = {"a link", "nothing"} | ({"a hole"} if name == "imagefolder" else set())
    for kind in kinds.PLACES.keys() - harmless:
        assert outcomes[kind] == "refused", kind
    assert len(outcomes) > len(kinds.PLACES) + len(kinds.CONTENTS) - 1


def remove(path):
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def test_every_loader_is_in_the_full_run(script):
    fuzz = script("fuzz")
    assert fuzz.INPUTS.keys() == fuzz.LOADERS.keys()
    assert sum(fuzz.INPUTS.values()) >= 100_000


def test_the_document_shows_the_full_run(script):
    fuzz = script("fuzz")
    result = json.loads(fuzz.RESULT.read_text())
    assert {row["loader"]: row["inputs"] for row in result["rows"]} == fuzz.INPUTS
    assert result["inputs"] >= 100_000
    assert "\n".join(fuzz.table(result)) in fuzz.DOCUMENT.read_text()
    assert not any(row["faults"] for row in result["rows"])


def test_what_is_written_elsewhere_is_seen(tmp_path, script):
    watch = script("fuzz").Watch(tmp_path / "inside")
    with watch:
        watch.see("open", (str(tmp_path / "inside" / "a"), "w", 1))
        watch.see("open", (str(tmp_path / "a"), "r", 0))
        assert not watch.found
        watch.see("open", (str(tmp_path / "inside" / ".." / "a"), "w", 1))
        assert watch.found
