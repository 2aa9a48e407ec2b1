"""What docs/scaling.md shows of bytes is within the target."""

import json
from pathlib import Path

RESULT = Path(__file__).parents[1] / "benchmarks/results/scaling.json"


def test_vgg16_at_95_percent_sends_at_most_8_percent_of_dense():
    dense, *rows = json.loads(RESULT.read_text())["traffic"]
    assert dense["rank"] is None
    row = next(r for r in rows if r["integrator"] == "parallel" and 0.95 <= r["compression"] < 0.96)
    assert row["factor_bytes"] + row["dense_bytes"] <= 0.08 * dense["dense_bytes"]
