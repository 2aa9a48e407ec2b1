"""The short form of programs/endurance.py, and what its result file claims."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tdlrt.linalg import orthonormality_tolerance

PROGRAM = Path(__file__).parent / "programs/endurance.py"
RESULT = Path(__file__).parents[2] / "benchmarks/results/endurance.json"


def load():
    spec = importlib.util.spec_from_file_location("endurance", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_flat(rows):
    """Nothing grows between the first block and the last, while ranks kept moving."""
    first, last = rows[0], rows[-1]
    # The smallest basis has the smallest tolerance.
    allowed = orthonormality_tolerance(torch.float32, 3)
    assert max(row["orthonormality_error"] for row in rows) <= allowed
    assert last["tensors"] <= first["tensors"] + 20  # momenta may be there or not
    assert last["objects"] <= 1.01 * first["objects"]
    assert last["resident_mb"] <= 1.05 * first["resident_mb"]
    assert min(row["distinct_ranks"] for row in rows) > 1


@pytest.mark.slow
@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_500_steps_leave_nothing_behind(integrator):
    rows = list(load().endure(integrator, 500, block=100))
    assert len(rows) == 5
    assert_flat(rows[1:])


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_the_result_file_is_flat(integrator):
    result = json.loads(RESULT.read_text())
    rows = [row for row in result["rows"] if row["integrator"] == integrator]
    assert rows[-1]["step"] == 10_000
    assert_flat(rows)
