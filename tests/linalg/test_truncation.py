import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import reference
from reference.cases import (
    TuckerCase,
    gaussian,
    laws,
    on_every_device,
    orthonormal,
    relative_error,
    rounding,
    tucker_cases,
)
from tdlrt.linalg import multi_mode_product, smallest_rank, truncate
from tdlrt.ranks import RelativeTolerance

Rule = Callable[[int, Tensor], int]
tolerances = st.sampled_from([0.0, 1e-6, 0.1, 0.3, 0.6, 0.9])


def decaying(case: TuckerCase, device: str = "cpu") -> Tensor:
    """A tensor whose singular values fall off in every mode, as those of a trained weight do."""
    tensor = case.tensor(0, device)
    for mode, n in enumerate(case.shape):
        weights = torch.logspace(0, -2, n, dtype=case.dtype, device=device)
        tensor = multi_mode_product(
            tensor, [weights.diag() if i == mode else None for i in range(mode + 1)]
        )
    return tensor


def rule_for(tensor: Tensor, policy: RelativeTolerance, modes: tuple[int, ...]) -> Rule:
    squared_norm = float(tensor.double().square().sum())
    return policy.rule(squared_norm, tensor.ndim, modes)


def restored(core: Tensor, projections: tuple[Tensor | None, ...]) -> Tensor:
    return multi_mode_product(core, projections)


def fits(ranks: tuple[int, ...]) -> bool:
    return all(rank <= math.prod(ranks) // rank for rank in ranks)


@on_every_device
@laws
@given(case=tucker_cases(), tau=tolerances)
def test_truncation_equals_its_twin(device: str, case: TuckerCase, tau: float) -> None:
    tensor = decaying(case, device)
    modes = tuple(range(case.order))
    core, projections = truncate(tensor, rule_for(tensor, RelativeTolerance(tau), modes))
    expected_core, factors = reference.truncate(reference.as_double(tensor), tau)
    assert core.shape == expected_core.shape
    expected = reference.tucker_to_dense(expected_core, factors)
    assert relative_error(restored(core, projections), expected) <= rounding(case.dtype, 1e5)


@on_every_device
@laws
@given(case=tucker_cases(), tau=tolerances)
def test_truncation_keeps_its_promises(device: str, case: TuckerCase, tau: float) -> None:
    tensor = decaying(case, device)
    modes = tuple(range(case.order))
    core, projections = truncate(tensor, rule_for(tensor, RelativeTolerance(tau), modes))
    assert relative_error(restored(core, projections), tensor) <= tau + rounding(case.dtype)
    assert fits(tuple(core.shape))
    assert core.dtype == tensor.dtype
    back = multi_mode_product(tensor, projections, transpose=True)
    assert relative_error(core, back) <= rounding(case.dtype)
    for size, rank, projection in zip(tensor.shape, core.shape, projections, strict=True):
        if projection is None:
            assert rank == size
        else:
            gram = projection.mT @ projection
            assert relative_error(gram, torch.eye(rank)) <= rounding(case.dtype)


@laws
@given(case=tucker_cases(), tau=st.sampled_from([1e-6, 0.1, 0.3, 0.6, 0.9]))
def test_one_rank_less_would_break_the_budget_of_its_mode(case: TuckerCase, tau: float) -> None:
    tensor = decaying(case)
    budget = tau**2 * float(tensor.double().square().sum()) / (case.order if case.order > 2 else 1)
    chosen = rule_for(tensor, RelativeTolerance(tau), tuple(range(case.order)))
    asked = []

    def rule(mode: int, values: Tensor) -> int:
        rank = chosen(mode, values)
        asked.append(mode)
        assert values.dtype == torch.float64
        assert values[rank:].sum() <= budget
        assert rank == 1 or values[rank - 1 :].sum() > budget
        return rank

    truncate(tensor, rule)
    assert list(dict.fromkeys(asked)) == list(range(case.order))
    times = {asked.count(mode) for mode in asked}
    assert times <= ({1} if case.dtype == torch.float64 else {1, 2})  # float32, then float64


@on_every_device
@laws
@given(case=tucker_cases())
def test_low_rank_data_is_reproduced_with_its_ranks(device: str, case: TuckerCase) -> None:
    core, factors = case.core(device), case.factors(device)
    weakest = min(
        float(torch.linalg.svdvals(reference.unfold(reference.as_double(core), i))[-1])
        for i in range(case.order)
    )
    assume(weakest > 1e-2 * core.norm())
    weight = multi_mode_product(core, factors)
    modes = tuple(range(case.order))
    small, projections = truncate(weight, rule_for(weight, RelativeTolerance(1e-4), modes))
    assert tuple(small.shape) == case.ranks
    assert relative_error(restored(small, projections), weight) <= rounding(case.dtype)


@laws
@given(case=tucker_cases())
def test_prescribed_ranks_equal_the_twin(case: TuckerCase) -> None:
    tensor = decaying(case)
    core, projections = truncate(tensor, lambda mode, values: case.ranks[mode])
    expected_core, factors = reference.truncate(reference.as_double(tensor), ranks=case.ranks)
    assert core.shape == expected_core.shape == case.ranks
    expected = reference.tucker_to_dense(expected_core, factors)
    assert relative_error(restored(core, projections), expected) <= rounding(case.dtype, 1e5)


@laws
@given(case=tucker_cases(), tau=st.sampled_from([0.0, 0.1, 0.5]))
def test_modes_left_out_stay_whole(case: TuckerCase, tau: float) -> None:
    assume(case.order > 2)
    tensor = decaying(case)
    core, projections = truncate(tensor, rule_for(tensor, RelativeTolerance(tau), (0, 1)), (0, 1))
    expected_core, factors = reference.truncate(reference.as_double(tensor), tau, modes=(0, 1))
    assert core.shape == expected_core.shape
    assert projections[2:] == (None,) * (case.order - 2)
    expected = reference.tucker_to_dense(expected_core, factors)
    assert relative_error(restored(core, projections), expected) <= rounding(case.dtype, 1e5)


@pytest.mark.parametrize("rank", [5, 6])
def test_a_mode_made_too_large_by_a_later_cut_is_cut_too(rank: int) -> None:
    tensor = gaussian((6, 2, 3), 0)
    core, projections = truncate(tensor, lambda mode, values: (rank, 1, 3)[mode])
    expected_core, factors = reference.truncate(tensor, ranks=(rank, 1, 3))
    assert core.shape == (3, 1, 3)
    expected = reference.tucker_to_dense(expected_core, factors)
    assert relative_error(restored(core, projections), expected) <= 1e-12


@laws
@given(
    case=tucker_cases(),
    tau=tolerances,
    bounds=st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(1, 4)),
)
def test_bounds_come_after_the_tolerance(
    case: TuckerCase, tau: float, bounds: tuple[int, int, int]
) -> None:
    smallest, extra, multiple = bounds
    policy = RelativeTolerance(
        tau, min_rank=smallest, max_rank=smallest + extra, multiple_of=multiple
    )
    tensor = decaying(case)
    modes = tuple(range(case.order))
    free = rule_for(tensor, RelativeTolerance(tau), modes)
    bounded = rule_for(tensor, policy, modes)

    def rule(mode: int, values: Tensor) -> int:
        wanted, rank, ceiling = (
            free(mode, values),
            bounded(mode, values),
            min(smallest + extra, len(values)),
        )
        assert min(smallest, len(values)) <= rank <= ceiling
        assert rank >= min(wanted, ceiling)
        assert rank % multiple == 0 or rank == ceiling
        assert rank < max(wanted, smallest) + multiple
        return rank

    core, _ = truncate(tensor, rule)
    assert fits(tuple(core.shape))
    assert all(rank <= smallest + extra for rank in core.shape)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1e-12, 1e-30, 0.0])
@pytest.mark.parametrize("shape", [(4, 4), (4, 3, 3), (3, 3, 2, 3)])
def test_ill_conditioned_cores_are_truncated_without_nan(
    device: str, dtype: torch.dtype, value: float, shape: tuple[int, ...]
) -> None:
    tensor = gaussian(shape, 0)
    rows = reference.unfold(tensor, 0)
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    values[-1] = value
    tensor = reference.fold(left @ values.diag() @ right, 0, shape).to(device, dtype)
    modes = tuple(range(len(shape)))
    for policy in (RelativeTolerance(0.0), RelativeTolerance(1e-6), RelativeTolerance(0.2)):
        core, projections = truncate(tensor, rule_for(tensor, policy, modes))
        assert relative_error(restored(core, projections), tensor) <= policy.tau + rounding(dtype)
        if policy.tau:
            assert core.shape[0] < shape[0]


@on_every_device
@pytest.mark.parametrize("shape", [(4, 4), (4, 3, 3)])
def test_a_zero_core_stays_zero(device: str, shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape, device=device)
    core, projections = truncate(tensor, lambda mode, values: 2)
    assert core.shape == (2,) * len(shape)
    assert torch.equal(restored(core, projections), tensor)


@pytest.mark.parametrize(
    ("budget", "rank"),
    [(0.0, 4), (0.9, 4), (1.0, 3), (4.9, 3), (5.0, 2), (13.9, 2), (14.0, 1), (99.0, 1)],
)
def test_smallest_rank_by_hand(budget: float, rank: int) -> None:
    values = torch.tensor([9.0, 9.0, 4.0, 1.0], dtype=torch.float64)
    assert smallest_rank(values, budget) == rank


def test_rotations_of_the_data_do_not_change_ranks_or_error() -> None:
    tensor = decaying(TuckerCase((6, 5, 4), (1, 1, 1), torch.float64, 0))
    rotations = [orthonormal(n, n, n) for n in tensor.shape]
    turned = multi_mode_product(tensor, rotations)
    results = [
        truncate(t, rule_for(t, RelativeTolerance(0.2), (0, 1, 2))) for t in (tensor, turned)
    ]
    (core, projections), (turned_core, turned_projections) = results
    assert core.shape == turned_core.shape
    expected = multi_mode_product(restored(core, projections), rotations)
    assert relative_error(restored(turned_core, turned_projections), expected) <= 1e-11


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_a_matrix_gets_the_smaller_of_two_ranks(shape):
    matrix = gaussian(shape, 0)
    small, projections = truncate(matrix, lambda mode, values: (4, 3)[mode])
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    expected = left[:, :3] * values[:3] @ right[:3]
    assert small.shape == (3, 3)
    assert torch.allclose(projections[0] @ small @ projections[1].T, expected)


def precisions_used(monkeypatch, core, rule):
    eigh, used = torch.linalg.eigh, []

    def spy(matrix):
        used.append(matrix.dtype)
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", spy)
    truncate(core, rule)
    return used


def graded(size: int, columns: int, smallest: float) -> Tensor:
    """A float32 matrix with singular values of about 1 to `smallest` and no axes of its own."""
    weights = torch.logspace(0, math.log10(smallest), size, dtype=torch.float64)
    matrix = gaussian((size, columns), 0) / math.sqrt(columns) * weights[:, None]
    return (orthonormal(size, size, 1) @ matrix).float()


@pytest.mark.parametrize("smallest", [1.0, 1e-1, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize(("size", "columns"), [(8, 8), (40, 300), (204, 612)])
def test_float32_values_are_as_exact_as_the_document_says(
    size: int, columns: int, smallest: float
) -> None:
    core = graded(size, columns, smallest)
    seen = []

    def rule(mode: int, values: Tensor) -> int:
        seen.append(values.flip(0).cumsum(0))
        return len(values)

    truncate(core, rule, modes=(0,))
    expected = torch.linalg.svdvals(core.double()).square().flip(0).cumsum(0)
    allowed = 2 * torch.finfo(torch.float32).eps * float(expected[-1])
    assert (seen[0] - expected)[:-1].abs().max() <= allowed


@pytest.mark.parametrize("tau", [0.3, 0.1, 0.01])
def test_float32_serves_the_tolerances_in_use(monkeypatch, tau: float) -> None:
    core = graded(24, 24 * 9, 1e-3).reshape(24, 24, 3, 3)
    rule = rule_for(core, RelativeTolerance(tau), (0, 1, 2, 3))
    assert set(precisions_used(monkeypatch, core, rule)) == {torch.float32}


@pytest.mark.parametrize("tau", [0.0, 1e-6, 1e-4, 1e-3])
def test_float64_serves_the_others(monkeypatch, tau: float) -> None:
    core = graded(24, 24 * 9, 1e-6)
    rule = rule_for(core, RelativeTolerance(tau), (0, 1))
    assert precisions_used(monkeypatch, core, rule) == [torch.float32, torch.float64]


def test_float64_separates_prescribed_ranks_that_float32_cannot(monkeypatch) -> None:
    core = graded(24, 200, 1e-6)
    used = precisions_used(monkeypatch, core, lambda mode, values: 22)
    assert used == [torch.float32, torch.float64]
    left, projections = truncate(core, lambda mode, values: 22)
    error = (restored(left, projections) - core).double().norm()
    values = torch.linalg.svdvals(core.double())
    assert error <= 1.01 * values[22:].norm() + rounding(torch.float32, 10)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_squares_beyond_float32_are_no_harm(size: float) -> None:
    core = graded(12, 30, 1e-2)
    ordinary, projections = truncate(core, lambda mode, values: 5)
    found, same = truncate(core * size, lambda mode, values: 5)
    expected = restored(ordinary, projections) * size
    assert relative_error(restored(found, same) / size, expected / size) <= rounding(torch.float32)
