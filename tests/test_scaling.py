"""What docs/scaling.md shows of bytes is within the target."""

import json
from pathlib import Path

RESULT = Path(__file__).parents[1] / "benchmarks/results/scaling.json"


def share_of_dense(integrator, dtype):
    """Of the bytes of a step of VGG16 at a compression of 95 %."""
    dense, *rows = json.loads(RESULT.read_text())["traffic"]
    assert dense["rank"] is None
    (row,) = (
        r
        for r in rows
        if (r["integrator"], r["dtype"]) == (integrator, dtype) and 0.95 <= r["compression"] < 0.96
    )
    return (row["factor_bytes"] + row["dense_bytes"]) / dense["dense_bytes"]


def test_vgg16_at_95_percent_sends_at_most_8_percent_of_dense():
    assert share_of_dense("parallel", "float32") <= 0.08


def test_bug_does_so_for_each_of_its_two_gradients_and_for_both_in_bfloat16():
    assert share_of_dense("bug", "float32") / 2 <= 0.08
    assert share_of_dense("bug", "bfloat16") <= 0.08
