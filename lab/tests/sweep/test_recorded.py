import json
import subprocess
import sys

import pytest

from tdlrt.errors import RunError
from tdlrt_lab.sweep.recorded import read_results, record


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results" / "digits.jsonl"


def test_a_line_per_row_and_seed(path):
    assert read_results(path) == []
    for row, seed in (("b", 0), ("a", 1), ("a", 0)):
        record(path, row, {"seed": seed, "accuracy": 1 / 3})
    results = read_results(path)
    places = (("a", 0), ("a", 1), ("b", 0))
    assert results == [{"row": r, "seed": s, "accuracy": 1 / 3} for r, s in places]
    assert [json.loads(line) for line in path.read_text().splitlines()] == results


def test_a_rerun_replaces_its_line_alone(path):
    for seed in (0, 1):
        record(path, "a", {"seed": seed, "accuracy": 1.0})
    record(path, "a", {"seed": 1, "accuracy": 2.0})
    assert [result["accuracy"] for result in read_results(path)] == [1.0, 2.0]


def test_processes_that_record_at_once_lose_nothing(path):
    code = (
        "import sys; from tdlrt_lab.sweep.recorded import record\n"
        "for seed in range(20): record(sys.argv[1], sys.argv[2], {'seed': seed})"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path), row]) for row in ("a", "b", "c")
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(read_results(path)) == 60


BROKEN = {
    "text": (
        '{"row": "a", "seed": 0}\n[',
        r"jsonl, line 2: cannot read the result of a finished run",
    ),
    "list": ("[]", r"jsonl, line 1: got list, expected an object"),
    "row": ('{"seed": 0}', r"jsonl, line 1: expected the name of a row and a seed"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_lines_are_named(path, text, message):
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(RunError, match=message):
        read_results(path)
    with pytest.raises(RunError, match=message):
        record(path, "a", {"seed": 0})
    assert path.read_text() == text
