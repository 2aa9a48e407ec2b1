"""benchmarks/gpt.py: what the page says about recorded bits per character, and what is measured."""

import pytest
import torch

from tdlrt_lab.config import RunConfig
from tdlrt_lab.gpt import GPT
from tdlrt_lab.models import MODELS

RECORD = {"training": {"characters": 1000}, "test": {"characters": 100}}


@pytest.fixture
def gpt(script):
    return script("gpt")


def result(row, method, seed, bits, budget=None, **options):
    config = RunConfig(
        model="gpt", data="stdlib", method=method, seed=seed, budget=budget, **options
    )
    return {
        "row": row,
        "method": method,
        "seed": seed,
        "accuracy": 50.0,
        "bits_per_character": bits,
        "compression": 0.0 if budget is None else 1 - budget,
        "parameters": 1000,
        "ranks": {},
        "text": RECORD,
        "versions": {"torch": "2.13.0"},
        "config": config.to_dict(),
    }


@pytest.fixture
def results():
    return [
        *(result("dense", "dense", seed, 2.0) for seed in (0, 1)),
        *(result("tdlrt_budget=0.5", "tdlrt", seed, 2.015, 0.5) for seed in (0, 1)),
        *(result("tdlrt_budget=0.25", "tdlrt", seed, 2.1 + seed / 100, 0.25) for seed in (0, 1)),
        *(result("matrix_budget=0.25", "matrix", seed, 2.2, 0.25) for seed in (0, 1)),
        result("matrix_budget=0.5", "matrix", 0, 2.0, 0.5),
    ]


def test_rows_stand_in_the_order_of_the_experiment_by_compression(gpt, results):
    assert [group.label for group in gpt.rows(results)] == [
        *("dense", "tdlrt 0.5", "tdlrt 0.25", "matrix 0.5", "matrix 0.25")
    ]


def test_findings_are_those_of_the_numbers(gpt, results):
    text = " ".join(gpt.findings(gpt.rows(results)).split())
    assert "tdlrt is +0.015 bits per character from dense: within the 0.02" in text
    assert "At 0.25 of the parameters, tdlrt is 0.095 bits per character ahead of factors" in text
    assert "the larger deviation between seeds is 0.007" in text
    assert "At 0.5 of the parameters, tdlrt is 0.015 bits per character behind factors" in text
    assert "with one seed there is no spread" in text
    worse = [dict(one) for one in results]
    for one in worse:
        one["bits_per_character"] += 0.01 * (one["row"] == "tdlrt_budget=0.5")
    assert "+0.025 bits per character from dense: not within" in gpt.findings(gpt.rows(worse))


def test_page_shows_the_rows_that_are_recorded(gpt, results):
    costs = {"command": "x", "versions": {}, "machine": {}, "rows": {"dense": {"fixed_ms": 400.0}}}
    text = gpt.document(gpt.rows(results), costs)
    assert "| dense | 0, 1 | 2.000 | 50.00 | 4,718,592 | 1.000 |" in text
    assert "| tdlrt 0.25 | 0, 1 | 2.105 ± 0.007 | 50.00 | 1,000 | 0.250 |" in text
    assert "| dense | 400 | - | - |" in text


def test_steps_keep_the_ranks_of_the_budget(gpt, monkeypatch):
    small = {"gpt": lambda shape, classes: GPT(classes, *shape, width=16, layers=1, heads=2)}
    monkeypatch.setattr("tdlrt_lab.models.MODELS", MODELS | small)
    row = RunConfig(model="gpt", data="stdlib", budget=0.5, batch_size=2)
    (_, fixed, one), (_, examined, ten) = gpt.steps(row)
    assert (one, ten) == (1, 10)
    for config in (fixed, examined):
        trained = gpt.training(config)
        assert 0.4 < 1 - trained.size.compression <= 0.5
        ranks, step = trained.ranks, gpt.step_of(trained)
        before = [parameter.clone() for parameter in trained.model.parameters()]
        for _ in range(ten):
            step()
        assert trained.ranks == ranks
        after = trained.model.parameters()
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
