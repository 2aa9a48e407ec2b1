"""The short form of programs/kills.py, and what its result file claims."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "programs/kills.py"
RESULT = Path(__file__).parents[2] / "benchmarks/results/kills.json"
EQUAL = ("metrics_equal", "weights_equal", "summary_equal")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_three_kills_leave_no_trace(tmp_path):
    words = ["--kills", "3", "--epochs", "4", "--out", tmp_path / "kills.json"]
    done = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "kills.json").read_text())
    assert result["kills"] == 3
    assert all(result[name] for name in EQUAL)


def test_the_result_file_tells_of_200_kills_and_equal_results():
    result = json.loads(RESULT.read_text())
    assert result["kills"] == 200
    assert result["starts_from_a_checkpoint"] >= 150
    assert all(result[name] for name in EQUAL)
