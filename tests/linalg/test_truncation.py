import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import reference
from reference.cases import (
    TuckerCase,
    behind,
    gaussian,
    laws,
    mixtures,
    on_every_device,
    orthonormal,
    padded,
    relative_error,
    rounding,
    stack_error,
    stack_laws,
    tucker_cases,
)
from tdlrt.linalg import (
    Cutoff,
    Truncation,
    kept_ranks,
    multi_mode_product,
    possible_ranks,
    relative_spectrum,
    squared_singular_values,
    truncate,
    truncate_stack,
)
from tdlrt.ranks import RelativeTolerance

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


def restored(core: Tensor, projections: tuple[Tensor | None, ...]) -> Tensor:
    return multi_mode_product(core, projections)


def fits(ranks: tuple[int, ...]) -> bool:
    return all(rank <= math.prod(ranks) // rank for rank in ranks)


@on_every_device
@laws
@given(case=tucker_cases(), tau=tolerances)
def test_truncation_equals_its_twin(device: str, case: TuckerCase, tau: float) -> None:
    tensor = decaying(case, device)
    core, projections = truncate(tensor, RelativeTolerance(tau).cutoff(tensor.shape))
    expected_core, factors = reference.truncate(reference.as_double(tensor), tau)
    assert core.shape == expected_core.shape
    expected = reference.tucker_to_dense(expected_core, factors)
    assert relative_error(restored(core, projections), expected) <= rounding(case.dtype, 1e5)


@on_every_device
@laws
@given(case=tucker_cases(), tau=tolerances)
def test_truncation_keeps_its_promises(device: str, case: TuckerCase, tau: float) -> None:
    tensor = decaying(case, device)
    core, projections = truncate(tensor, RelativeTolerance(tau).cutoff(tensor.shape))
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


def one(core: Tensor, cutoff: Cutoff, modes: Sequence[int] | None = None) -> Truncation:
    """The truncation of a stack of one, before dependent rows are cut."""
    modes = range(core.ndim) if modes is None else modes
    ranks = torch.tensor([core.shape], device=core.device)
    return truncate_stack(core[None], ranks, [cutoff], modes)


def squares_by_mode(core: Tensor, result: Truncation) -> list[Tensor]:
    """Squared singular values of every mode when its turn came, largest first."""
    squares, partly = [], reference.as_double(core)
    for mode, projection in enumerate(result.projections):
        values = torch.linalg.svdvals(reference.unfold(partly, mode)).square()
        squares.append(torch.nn.functional.pad(values, (0, partly.shape[mode] - len(values))))
        if projection is not None:
            kept = reference.as_double(projection[0, :, : result.ranks[0, mode]])
            partly = reference.mode_product(partly, kept.T, mode)
    return squares


@laws
@given(case=tucker_cases(), tau=st.sampled_from([1e-6, 0.1, 0.3, 0.6, 0.9]))
def test_one_rank_less_would_break_the_budget_of_its_mode(case: TuckerCase, tau: float) -> None:
    tensor = decaying(case)
    budget = tau**2 * float(tensor.double().square().sum()) / (case.order if case.order > 2 else 1)
    result = one(tensor, Cutoff(case.shape, tau))
    noise = rounding(case.dtype) * float(tensor.double().square().sum())
    assert result.ranks.dtype == torch.int64
    for rank, values in zip(result.ranks[0].tolist(), squares_by_mode(tensor, result), strict=True):
        assert values[rank:].sum() <= budget + noise
        assert rank == 1 or values[rank - 1 :].sum() > budget - noise
        if case.order == 2:
            break  # the other mode has the same rank


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
    small, projections = truncate(weight, Cutoff(case.shape, tau=1e-4))
    assert tuple(small.shape) == case.ranks
    assert relative_error(restored(small, projections), weight) <= rounding(case.dtype)


@laws
@given(case=tucker_cases())
def test_prescribed_ranks_equal_the_twin(case: TuckerCase) -> None:
    tensor = decaying(case)
    core, projections = truncate(tensor, Cutoff(case.ranks))
    expected_core, factors = reference.truncate(reference.as_double(tensor), ranks=case.ranks)
    assert core.shape == expected_core.shape == case.ranks
    expected = reference.tucker_to_dense(expected_core, factors)
    assert relative_error(restored(core, projections), expected) <= rounding(case.dtype, 1e5)


@laws
@given(case=tucker_cases(), tau=st.sampled_from([0.0, 0.1, 0.5]))
def test_modes_left_out_stay_whole(case: TuckerCase, tau: float) -> None:
    assume(case.order > 2)
    tensor = decaying(case)
    core, projections = truncate(tensor, Cutoff(case.shape, tau), (0, 1))
    expected_core, factors = reference.truncate(reference.as_double(tensor), tau, modes=(0, 1))
    assert core.shape == expected_core.shape
    assert projections[2:] == (None,) * (case.order - 2)
    expected = reference.tucker_to_dense(expected_core, factors)
    assert relative_error(restored(core, projections), expected) <= rounding(case.dtype, 1e5)


@pytest.mark.parametrize("rank", [5, 6])
def test_a_mode_made_too_large_by_a_later_cut_is_cut_too(rank: int) -> None:
    tensor = gaussian((6, 2, 3), 0)
    core, projections = truncate(tensor, Cutoff((rank, 1, 3)))
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
    result = one(tensor, policy.cutoff(case.shape))
    share = float(tensor.double().square().sum()) / (case.order if case.order > 2 else 1)
    for rank, squares in zip(
        result.ranks[0].tolist(), squares_by_mode(tensor, result), strict=True
    ):
        size = min(case.shape) if case.order == 2 else len(squares)
        wanted = reference.smallest_rank(squares.sqrt(), tau, share)
        ceiling = min(smallest + extra, size)
        assert min(smallest, size) <= rank <= ceiling
        assert rank >= min(wanted, ceiling)
        assert rank % multiple == 0 or rank == ceiling
        assert rank < max(wanted, smallest) + multiple
        if case.order == 2:
            assert result.ranks[0, 1] == rank
            break

    core, _ = truncate(tensor, policy.cutoff(case.shape))
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
    for tau in (0.0, 1e-6, 0.2):
        core, projections = truncate(tensor, Cutoff(shape, tau))
        assert relative_error(restored(core, projections), tensor) <= tau + rounding(dtype)
        if tau:
            assert core.shape[0] < shape[0]


@on_every_device
@pytest.mark.parametrize("shape", [(4, 4), (4, 3, 3)])
def test_a_zero_core_stays_zero(device: str, shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape, device=device)
    core, projections = truncate(tensor, Cutoff((2,) * len(shape)))
    assert core.shape == (2,) * len(shape)
    assert torch.equal(restored(core, projections), tensor)


@pytest.mark.parametrize(
    ("budget", "rank"),
    [(0.0, 4), (0.9, 4), (1.0, 3), (4.9, 3), (5.0, 2), (13.9, 2), (14.0, 1), (99.0, 1)],
)
def test_kept_ranks_by_hand(budget: float, rank: int) -> None:
    values = torch.tensor([9.0, 9.0, 4.0, 1.0], dtype=torch.float64)
    four = torch.tensor([4])
    for size in (1.0, 1 / 23):  # the squares, or their shares
        budgets = torch.tensor([budget * size], dtype=torch.float64)
        assert kept_ranks(values[None] * size, four, budgets, four).tolist() == [rank]
        behind = torch.nn.functional.pad(values * size, (0, 3))[None]
        assert kept_ranks(behind, four, budgets, four).tolist() == [rank]


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({}, [2, 4, 4]),
        ({"spare": 0.25}, [3, 4, 4]),
        ({"spare": 0.5}, [3, 4, 4]),
        ({"spare": 0.51}, [4, 4, 4]),
        ({"min_rank": 3}, [3, 4, 4]),
        ({"min_rank": 9}, [4, 4, 4]),
        ({"multiple_of": 3}, [3, 4, 4]),
        ({"multiple_of": 3, "min_rank": 4}, [4, 4, 4]),
        ({"limit": 3}, [2, 3, 3]),
        ({"limit": 3, "multiple_of": 4}, [3, 3, 3]),
        ({"limit": 1, "min_rank": 3}, [1, 1, 1]),
        ({"available": 3, "multiple_of": 4}, [3, 3, 3]),
    ],
)
def test_bounds_of_kept_ranks_by_hand(options: dict[str, float], ranks: list[int]) -> None:
    """For a budget that keeps two, for one of nothing, and for a core of zeros."""
    spectrum = torch.tensor([[9.0, 9.0, 4.0, 1.0], [9.0, 9.0, 4.0, 0.0], [0.0, 0, 0, 0]]) / 23
    budget = torch.tensor([5.1 / 23, -1.0, 0.1], dtype=torch.float64)
    every = {"available": 4, "limit": 9} | options
    bounds = {name: torch.tensor([value] * 3) for name, value in every.items()}
    for zeros in (0, 5):
        values = torch.nn.functional.pad(spectrum.double(), (0, zeros))
        found = kept_ranks(values, budget=budget, **bounds)
        assert found.dtype == torch.int64
        assert found.tolist() == ranks


@pytest.mark.parametrize(("budget", "rank"), [(2.5, 4), (3.5, 3), (5.5, 3), (6.5, 2), (10.5, 1)])
def test_a_matrix_spends_its_budget_once(budget: float, rank: int) -> None:
    squares = torch.tensor([9.0, 4.0, 3.0, 3.0], dtype=torch.float64)
    core = orthonormal(5, 4, 0) @ squares.sqrt().diag() @ orthonormal(6, 4, 1).T
    cutoff = Cutoff(core.shape, tau=math.sqrt(budget / 19))
    assert one(core, cutoff).ranks.tolist() == [[rank, rank]]
    assert truncate(core, cutoff)[0].shape == (rank, rank)


def test_rotations_of_the_data_do_not_change_ranks_or_error() -> None:
    tensor = decaying(TuckerCase((6, 5, 4), (1, 1, 1), torch.float64, 0))
    rotations = [orthonormal(n, n, n) for n in tensor.shape]
    turned = multi_mode_product(tensor, rotations)
    results = [truncate(t, Cutoff(t.shape, tau=0.2)) for t in (tensor, turned)]
    (core, projections), (turned_core, turned_projections) = results
    assert core.shape == turned_core.shape
    expected = multi_mode_product(restored(core, projections), rotations)
    assert relative_error(restored(turned_core, turned_projections), expected) <= 1e-11


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_a_matrix_gets_the_smaller_of_two_ranks(shape):
    matrix = gaussian(shape, 0)
    small, projections = truncate(matrix, Cutoff((4, 3)))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    expected = left[:, :3] * values[:3] @ right[:3]
    assert small.shape == (3, 3)
    for limits in ((4, 3), (3, 4)):
        assert one(matrix, Cutoff(limits)).ranks.tolist() == [[3, 3]]
    assert torch.allclose(projections[0] @ small @ projections[1].T, expected)


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
    found = relative_spectrum(core[None], 0)[0].flip(0).cumsum(0)
    squares = squared_singular_values(core, 0).flip(0).cumsum(0)
    expected = torch.linalg.svdvals(core.double()).square().flip(0).cumsum(0)
    allowed = rounding(torch.float64, 1000) * float(expected[-1])
    assert (found * expected[-1] - expected).abs().max() <= allowed
    assert (squares - expected).abs().max() <= allowed


@pytest.mark.parametrize("tau", [0.3, 0.1, 0.01, 1e-3, 1e-4, 1e-6, 0.0])
def test_float64_serves_every_tolerance(tau: float) -> None:
    core = graded(24, 24 * 9, 1e-6)
    exact = torch.linalg.svdvals(core.double()).square()
    rank = 24 if tau == 0 else reference.smallest_rank(exact.sqrt(), tau, float(exact.sum()))
    small, projections = truncate(core, Cutoff(core.shape, tau))
    assert small.shape == (rank, rank)
    error = relative_error(restored(small, projections), core)
    assert error <= tau + rounding(torch.float32, 10)


def test_float64_separates_prescribed_ranks_that_float32_cannot() -> None:
    core = graded(24, 200, 1e-6)
    left, projections = truncate(core, Cutoff((22, 22)))
    error = (restored(left, projections) - core).double().norm()
    values = torch.linalg.svdvals(core.double())
    assert error <= 1.01 * values[22:].norm() + rounding(torch.float32, 10)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (1e-25, torch.float32),
        (1e25, torch.float32),
        (1e-150, torch.float64),
        (1e150, torch.float64),
    ],
)
def test_squares_beyond_float32_are_no_harm(size: float, dtype: torch.dtype) -> None:
    core = graded(12, 30, 1e-2).to(dtype)
    for cutoff in (Cutoff((5, 5)), Cutoff((12, 30), tau=0.1)):
        ordinary, projections = truncate(core, cutoff)
        found, same = truncate(core * size, cutoff)
        assert found.shape == ordinary.shape
        assert found.shape[0] < 12
        expected = restored(ordinary, projections) * size
        error = relative_error(restored(found, same) / size, expected / size)
        assert error <= rounding(torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_spoils_no_other_member(dtype: torch.dtype, value: float) -> None:
    core = torch.stack([gaussian((4, 3, 3), n, dtype) for n in range(2)])
    ranks, cutoffs = torch.tensor([[4, 3, 3]] * 2), [Cutoff((2, 2, 2))] * 2
    expected = truncate_stack(core, ranks, cutoffs, range(3))
    spectrum = relative_spectrum(core, 0)
    core[0, 1, 1, 1] = value
    found = truncate_stack(core, ranks, cutoffs, range(3))
    assert not found.core[0].isfinite().all()
    assert torch.equal(found.core[1], expected.core[1])
    spoilt = relative_spectrum(core, 0)
    assert not spoilt[0].any()
    assert torch.equal(spoilt[1], spectrum[1])


# --- many cores at once -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "modes", "expected"),
    [
        ((6, 2, 3), (0, 1, 2), (6, 2, 3)),
        ((7, 2, 3), (0, 1, 2), (6, 2, 3)),
        ((7, 2, 3), (1, 2), (7, 2, 3)),
        ((5, 4), (0, 1), (4, 4)),
        ((5, 4), (1,), (5, 4)),
        ((1, 9, 1, 1), (0, 1, 2, 3), (1, 1, 1, 1)),
        ((1, 1, 3), (0, 1, 2), (1, 1, 1)),
        ((2, 9, 3, 1), (1, 2), (2, 6, 3, 1)),
    ],
)
def test_possible_ranks_by_hand(
    ranks: tuple[int, ...], modes: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert possible_ranks(ranks, modes) == expected


@laws
@given(ranks=st.lists(st.integers(1, 9), min_size=2, max_size=5), seed=st.integers(0, 9))
def test_possible_ranks_are_the_largest_and_lose_nothing(ranks: list[int], seed: int) -> None:
    modes = range(len(ranks))
    found = possible_ranks(ranks, modes)
    assert fits(found)
    assert all(new <= old for new, old in zip(found, ranks, strict=True))
    for mode in modes:  # one more would not fit, or is not there
        more = [rank + (i == mode) for i, rank in enumerate(found)]
        assert found[mode] == ranks[mode] or more[mode] ** 2 > math.prod(more)
    if math.prod(ranks) <= 500:
        core = gaussian(ranks, seed)
        result = one(core, Cutoff(found))
        assert relative_error(restored(result.core, result.projections)[0], core) <= 1e-12


@on_every_device
@stack_laws
@given(
    mixture=mixtures(),
    bounds=st.lists(
        st.tuples(
            tolerances,
            st.integers(1, 3),
            st.integers(1, 3),
            st.sampled_from([0.0, 0.25]),
            st.booleans(),
        ),
        min_size=3,
        max_size=3,
    ),
)
def test_every_member_of_a_stack_is_cut_as_it_is_alone(
    device: str,
    mixture: tuple[list[TuckerCase], tuple[int, ...]],
    bounds: list[tuple[float, int, int, float, bool]],
) -> None:
    cases, modes = mixture
    tensors = [decaying(case, device) for case in cases]
    cutoffs = [
        Cutoff(
            tuple(max(1, n - 1) if tight else n for n in case.shape), tau, least, multiple, spare
        )
        for case, (tau, least, multiple, spare, tight) in zip(cases, bounds, strict=False)
    ]
    ranks = torch.tensor([tensor.shape for tensor in tensors], device=device)
    found = truncate_stack(padded(tensors), ranks, cutoffs, modes)
    alone = [one(t, c, modes) for t, c in zip(tensors, cutoffs, strict=True)]
    assert torch.equal(found.ranks, torch.cat([result.ranks for result in alone]))
    kept = found.ranks.tolist()
    cores = [
        result.core[0][tuple(slice(0, r) for r in own)]
        for result, own in zip(alone, kept, strict=True)
    ]
    allowed = rounding(cases[0].dtype, 1e5)
    # Cores up to the signs of singular vectors, the tensors that they stand for exactly.
    assert stack_error(found.core.abs(), [core.abs() for core in cores]) <= allowed
    whole = [restored(result.core, result.projections)[0] for result in alone]
    assert stack_error(restored(found.core, found.projections), whole) <= allowed
    for mode, projection in enumerate(found.projections):
        assert (projection is None) == (mode not in modes)
        if projection is not None:
            true = [
                torch.ones(n, own[mode])
                for n, own in zip([tensor.shape[mode] for tensor in tensors], kept, strict=True)
            ]
            for matrix, mask in zip(projection, true, strict=True):
                own = matrix[: mask.shape[0], : mask.shape[1]]
                assert relative_error(own.mT @ own, torch.eye(mask.shape[1])) <= allowed
            assert not behind(projection, [mask.to(projection) for mask in true]).any()


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shapes", [((5, 4, 4), (7, 6, 5)), ((5, 4), (6, 7)), ((4, 3, 2, 2),) * 2])
@pytest.mark.parametrize("hollow", [True, False])
def test_what_is_not_there_comes_after_singular_values_of_zero(
    device: str, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], hollow: bool
) -> None:
    """Ranks between that of a core and those it has: what is kept lies in what there is."""
    order = len(shapes[0])
    small = gaussian((2,) * order, 0)
    cores = []
    for shape in shapes:
        if hollow:  # as after a step whose new directions came to nothing
            core = torch.zeros(shape, dtype=torch.float64)
            core[(slice(0, 2),) * order] = small
        else:
            core = multi_mode_product(small, [orthonormal(n, 2, n) for n in shape])
        cores.append(core.to(device, dtype))
    room = [size + 3 for size in shapes[-1]]
    kept = [tuple(max(2, n - 1) for n in shape) for shape in shapes]
    if order == 2:
        kept = [(min(of),) * 2 for of in kept]
    ranks = torch.tensor(shapes, device=device)
    result = truncate_stack(padded(cores, room), ranks, [Cutoff(of) for of in kept], range(order))
    assert result.ranks.tolist() == [list(of) for of in kept]
    for mode, projection in enumerate(result.projections):
        for number, matrix in enumerate(projection):
            size, rank = shapes[number][mode], kept[number][mode]
            true = matrix[:size, :rank]
            assert relative_error(true.mT @ true, torch.eye(rank)) <= rounding(dtype)
            assert not matrix[size:].any()
            assert not matrix[:, rank:].any()
    whole = restored(result.core, result.projections)
    assert stack_error(whole, cores) <= rounding(dtype)


@on_every_device
@stack_laws
@given(mixture=mixtures())
def test_the_spectra_of_a_stack_are_those_of_its_members(
    device: str, mixture: tuple[list[TuckerCase], tuple[int, ...]]
) -> None:
    tensors = [decaying(case, device) for case in mixture[0]]
    for mode in range(tensors[0].ndim):
        found = relative_spectrum(padded(tensors), mode)
        assert found.dtype == torch.float64
        expected = []
        for tensor in tensors:
            matrix = reference.unfold(reference.as_double(tensor), mode)
            values = torch.linalg.svdvals(matrix).square() / matrix.square().sum()
            missing = len(matrix) - len(values)
            expected.append(torch.nn.functional.pad(values, (0, missing)))
        assert (found.cpu() - padded(expected)).abs().max() <= 1e-13
        assert (found[:, 1:] <= found[:, :-1]).all()


def test_a_core_of_zeros_keeps_what_it_has_beside_others() -> None:
    core = padded([torch.zeros(3, 2, 2).double(), gaussian((4, 3, 3), 0)])
    ranks = torch.tensor([[3, 2, 2], [4, 3, 3]])
    result = truncate_stack(core, ranks, [Cutoff((4, 3, 3), 0.5), Cutoff((2, 2, 2))], range(3))
    assert result.ranks.tolist() == [[3, 2, 2], [2, 2, 2]]
    assert not result.core[0].any()
    for projection, rank in zip(result.projections, (3, 2, 2), strict=True):
        expected = torch.eye(len(projection[0])).double()
        expected[:, rank:] = 0
        assert torch.equal(projection[0], expected)


@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (4, 4)])
def test_a_mode_that_loses_nothing_keeps_its_basis(shape: tuple[int, int]) -> None:
    core = gaussian(shape, 0)
    result = one(core, Cutoff(shape))
    assert result.ranks.tolist() == [[4, 4]]
    shorter = shape.index(4)
    assert torch.equal(result.projections[shorter][0], torch.eye(4).double())
    assert relative_error(restored(result.core, result.projections)[0], core) <= 1e-13
