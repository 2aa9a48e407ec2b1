"""The claims of docs/theory.md, on the problems of benchmarks/theory.py."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import tdlrt

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "theory.py"
EPS = torch.finfo(torch.float64).eps


def load():
    spec = importlib.util.spec_from_file_location("theory", SCRIPT)
    module = sys.modules["theory"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


theory = load()
every_layer = pytest.mark.parametrize("kind", theory.SHAPES)
every_integrator = pytest.mark.parametrize("integrator", theory.INTEGRATORS)


@every_layer
@every_integrator
def test_error_is_of_first_order_and_does_not_depend_on_the_smallest_singular_value(
    kind, integrator
):
    errors = {
        steps: [theory.final_error(kind, sigma, steps, integrator) for sigma in (1e-1, 1e-8)]
        for steps in (8, 16)
    }
    for steps, values in errors.items():
        assert max(values) <= 1.1 * min(values)
        assert max(values) <= 1 / steps
    for coarse, fine in zip(errors[8], errors[16], strict=True):
        assert coarse / fine == pytest.approx(2, rel=0.1)


@every_layer
def test_the_flow_of_the_factors_needs_steps_below_the_smallest_singular_value(kind):
    harmless, small, smaller = (
        theory.final_error(kind, sigma, 16, "factor flow") for sigma in (1e-1, 1e-6, 1e-8)
    )
    assert harmless <= 1 / 16
    assert small >= 10
    assert smaller / small == pytest.approx(100, rel=0.1)


@every_layer
def test_gradient_descent_on_the_factors_is_not_helped_by_smaller_steps(kind):
    coarse, fine = (theory.final_error(kind, 1e-4, steps, "factor descent") for steps in (8, 32))
    assert fine >= 0.9 * coarse >= 0.5


@every_layer
def test_only_gradient_descent_on_the_factors_waits_for_a_small_direction_to_grow(kind):
    dense = theory.fit_steps(kind, 1e-8, "dense")
    assert [theory.fit_steps(kind, 1e-8, name) for name in theory.INTEGRATORS] == [dense] * 2
    early, late = (theory.fit_steps(kind, sigma, "factor descent") for sigma in (1e-2, 1e-6))
    assert early > 3 * dense
    # The growing mode of c' = a - c, a' = c under Euler's method.
    rate = torch.tensor(1 + theory.STALL_LR * 0.618034).log() / torch.tensor(1e4).log()
    assert late - early == pytest.approx(1 / float(rate), rel=0.05)


@every_layer
def test_fixed_rank_differs_from_the_truncated_hosvd_by_the_step_size_above_sigma(kind):
    def difference(sigma, lr):
        curve = theory.Curve(kind, sigma)
        loss = theory.squared_distance(theory.decaying_tensor(theory.SHAPES[kind], 1))
        weights = []
        for policy in (tdlrt.FixedRank(), tdlrt.RelativeTolerance(0.0, max_rank=theory.RANK)):
            layer = curve.layer()
            optimizer = tdlrt.TDLRT(layer, torch.optim.SGD, lr=lr, rank_policy=policy)
            optimizer.step(theory.closure_of(layer, loss))
            weights.append(theory.weight_of(layer))
        return float((weights[0] - weights[1]).norm())

    assert difference(1e-8, 1e-2) / difference(1e-8, 1e-3) == pytest.approx(10, rel=0.2)
    assert difference(1e-1, 1e-2) / difference(1e-1, 1e-3) > 90


@every_layer
@every_integrator
@pytest.mark.parametrize("tau", theory.DESCENT_TAUS)
def test_every_step_descends_by_what_is_guaranteed(kind, integrator, tau):
    measured, guaranteed = theory.descent(kind, integrator, tau, steps=10)
    rounding = 100 * EPS * sum(map(abs, measured))
    assert all(a >= b - rounding for a, b in zip(measured, guaranteed, strict=True))
    assert guaranteed[0] > 0.3 * measured[0]
    if not tau:
        assert min(guaranteed) > 0


@every_layer
@every_integrator
def test_the_guarantee_is_attained_by_a_quadratic_loss(kind, integrator):
    measured, guaranteed = theory.descent(
        kind, integrator, 0.0, steps=5, fit=theory.squared_distance
    )
    assert measured == pytest.approx(guaranteed, rel=1e-8)


@every_layer
@every_integrator
def test_distance_from_the_dense_run_is_bounded_and_proportional_to_tau(kind, integrator):
    taus = (1e-3, 1e-2, 1e-1)
    results = [theory.distance(kind, integrator, tau, steps=12) for tau in taus]
    distances = [result["distance"] for result in results]
    assert all(result["distance"] <= result["bound"] for result in results)
    assert all(0.1 * tau < value < 3 * tau for tau, value in zip(taus, distances, strict=True))
    assert theory.log_slope(taus, distances) == pytest.approx(1, abs=0.2)


@every_layer
@pytest.mark.parametrize("sigma", (1e-1, 1e-4, 1e-8))
@pytest.mark.parametrize(
    ("integrator", "path"), [("parallel", "one mode"), ("bug", "one mode"), ("bug", "all modes")]
)
def test_paths_of_low_rank_are_reproduced(kind, integrator, path, sigma):
    # `bug` truncates, and its Gram matrices resolve singular values down to sqrt(eps).
    allowed = 20 * EPS if integrator == "parallel" else 20 * EPS + min(2 * EPS / sigma, EPS**0.5)
    assert max(theory.reproduction_errors(kind, path, integrator, sigma)) <= allowed


@every_layer
@pytest.mark.parametrize("sigma", (1e-1, 1e-4, 1e-8))
def test_parallel_misses_at_most_what_is_outside_the_tangent_space(kind, sigma):
    curve = theory.Curve(kind, sigma)
    space = theory.tangent_space(curve.layer())
    start = curve.value(0.0)
    turns = [torch.linalg.matrix_exp(rate / 8) for rate in curve.rates]
    end = theory.multi_mode_product(start, turns)
    outside = end - start - space.to_tensor(space.project((end - start)[None]))[0]
    (error,) = theory.reproduction_errors(kind, "all modes", "parallel", sigma, steps=1)
    assert 1e-6 <= error <= float(outside.norm() / end.norm())


def test_the_page_holds_the_numbers_of_the_result_file():
    result = json.loads(theory.RESULT.read_text(encoding="utf-8"))
    text = theory.PAGE.read_text(encoding="utf-8")
    assert theory.page(text, result) == text
    assert all(f"figures/{path.name}" in text for path in theory.FIGURES.glob("theory_*.svg"))


def test_figures_are_the_same_bytes_every_time(tmp_path):
    rows = json.loads(theory.RESULT.read_text(encoding="utf-8"))["stall"]
    paths = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for path in paths:
        theory.save(theory.draw_stall(rows), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
