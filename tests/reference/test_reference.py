"""The twins against numbers worked out by hand and against laws that need no library.

Rules and moments are in test_rules.py.
"""

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from reference import (
    SGD,
    Adam,
    State,
    bug_step,
    fold,
    kronecker,
    mode_product,
    multi_product,
    parallel_step,
    tangent_projection,
    truncate,
    tucker_to_dense,
    unfold,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_tucker(shape: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    bases = [
        torch.linalg.qr(random(n, r, seed=i))[0]
        for i, (n, r) in enumerate(zip(shape, ranks, strict=True))
    ]
    return random(*ranks, seed=99), bases


def first_axes(shape: tuple[int, ...]) -> list[Tensor]:
    """The rank-one bases e_1, one per mode."""
    return [torch.eye(n, dtype=torch.float64)[:, :1] for n in shape]


def superdiagonal(*values: float, order: int) -> Tensor:
    tensor = torch.zeros([len(values)] * order, dtype=torch.float64)
    for i, value in enumerate(values):
        tensor[(i,) * order] = value
    return tensor


# --- algebra ------------------------------------------------------------------------------------


def test_unfold_puts_fibres_side_by_side() -> None:
    tensor = torch.arange(12.0).reshape(2, 3, 2)  # T[i, j, k] = 6 i + 2 j + k
    assert unfold(tensor, 1).tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


@pytest.mark.parametrize("mode", range(4))
def test_fold_inverts_unfold(mode: int) -> None:
    tensor = random(2, 3, 4, 2)
    assert torch.equal(fold(unfold(tensor, mode), mode, tensor.shape), tensor)


@pytest.mark.parametrize("mode", range(3))
def test_unfolded_tucker_is_a_kronecker_identity(mode: int) -> None:
    core, matrices = random(2, 3, 4), [random(n, m) for n, m in [(5, 2), (4, 3), (3, 4)]]
    others = kronecker([m for i, m in enumerate(matrices) if i != mode])
    expected = matrices[mode] @ unfold(core, mode) @ others.T
    assert_close(unfold(multi_product(core, matrices), mode), expected, rtol=0, atol=1e-12)
    assert_close(unfold(tucker_to_dense(core, matrices), mode), expected, rtol=0, atol=1e-12)


def test_mode_product_of_a_matrix_is_a_matrix_product() -> None:
    t, m = random(3, 4), random(5, 4)
    assert_close(mode_product(t, m, 1), t @ m.T)


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4), (2, 3, 2, 2)])
def test_tangent_space_of_rank_one_holds_entries_with_one_index_off_axis(
    shape: tuple[int, ...],
) -> None:
    z = random(*shape)
    core = torch.full([1] * len(shape), 2.0, dtype=torch.float64)
    expected = torch.zeros_like(z)
    for index in itertools.product(*map(range, shape)):
        if sum(i != 0 for i in index) <= 1:
            expected[index] = z[index]
    assert_close(tangent_projection(core, first_axes(shape), z), expected, atol=1e-14, rtol=0)


def test_tangent_projection_reproduces_velocities_of_curves() -> None:
    core, factors = random_tucker((6, 5, 4), (3, 2, 2))

    def weight_at(time: Tensor) -> Tensor:
        moved = [u + time * random(*u.shape, seed=10 + i) for i, u in enumerate(factors)]
        return tucker_to_dense(core + time * random(*core.shape, seed=20), moved)

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    _, velocity = torch.autograd.functional.jvp(weight_at, zero, one)
    assert_close(tangent_projection(core, factors, velocity), velocity, rtol=0, atol=1e-11)


def test_tangent_projection_is_an_orthogonal_projection() -> None:
    core, factors = random_tucker((6, 5, 4), (3, 2, 2))
    a, b = random(6, 5, 4, seed=1), random(6, 5, 4, seed=2)
    projected_a, projected_b = (tangent_projection(core, factors, z) for z in (a, b))
    again = tangent_projection(core, factors, projected_a)
    assert_close(again, projected_a, rtol=0, atol=1e-12)
    assert_close((projected_a * b).sum(), (a * projected_b).sum(), rtol=1e-11, atol=0)


# --- truncation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "modes", "tau", "rank"),
    [
        # Values 3, 2, 1 in every mode, squared norm 14; the tail 1 fits when tau^2 14 / d >= 1.
        (3, None, 0.46, 3),
        (3, None, 0.47, 2),
        (3, (0, 1), 0.37, 3),
        (3, (0, 1), 0.38, 2),
        (2, None, 0.26, 3),
        (2, None, 0.27, 2),
        # Two tails, 1 + 4 = 5.
        (2, None, 0.59, 2),
        (2, None, 0.60, 1),
    ],
)
def test_ranks_of_a_superdiagonal_tensor(
    order: int, modes: tuple[int, ...] | None, tau: float, rank: int
) -> None:
    core, factors = truncate(superdiagonal(3, 2, 1, order=order), tau, modes=modes)
    assert all(core.shape[i] == rank for i in modes or range(order))
    kept = superdiagonal(*(v if i < rank else 0 for i, v in enumerate((3, 2, 1))), order=order)
    assert_close(tucker_to_dense(core, factors), kept, rtol=0, atol=1e-14)


def test_zero_tolerance_only_cuts_what_cannot_be_used() -> None:
    tensor = random(7, 2, 3)
    core, factors = truncate(tensor, 0)
    assert core.shape == (6, 2, 3)
    assert_close(tucker_to_dense(core, factors), tensor, rtol=0, atol=1e-13)


def test_a_cut_of_one_mode_cuts_a_mode_it_has_made_too_large() -> None:
    tensor = torch.zeros(4, 2, 2, dtype=torch.float64)
    tensor[[0, 1, 2, 3], [0, 0, 1, 1], [0, 1, 0, 1]] = torch.tensor([4.0, 4, 1, 1]).double()
    # Mode 1 falls to rank 1 after mode 0 was left at 4; two values of mode 0 are then zero.
    core, factors = truncate(tensor, ranks=(4, 1, 2))
    assert core.shape == (2, 1, 2)
    tensor[2:] = 0
    assert_close(tucker_to_dense(core, factors), tensor, rtol=0, atol=1e-14)


def test_zero_tolerance_keeps_zero_values() -> None:
    assert truncate(superdiagonal(2, 1, 0, order=3), 0)[0].shape == (3, 3, 3)


def test_a_zero_tensor_has_rank_one() -> None:
    assert truncate(torch.zeros(3, 3, 3).double(), 0.1)[0].shape == (1, 1, 1)


# --- integrators --------------------------------------------------------------------------------

E1 = torch.eye(3, dtype=torch.float64)[:, :1]
TWO = torch.full((1, 1), 2.0, dtype=torch.float64)


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


GRADIENT = matrix([1, 3, 0], [5, 7, 2], [0, 8, 9])


def test_parallel_step_by_hand() -> None:
    core, factors, state = parallel_step(
        TWO, [E1, E1], GRADIENT, rule=SGD(momentum=0.9), lr=0.1, tau=0
    )
    expected = matrix([1.9, -0.3, 0], [-0.5, 0, 0], [0, 0, 0])
    assert_close(tucker_to_dense(core, factors), expected, rtol=0, atol=1e-14)
    # At the new weight e_1 and e_2 span both spaces, so all of the old direction is tangent.
    expected = matrix([1, 3, 0], [5, 0, 0], [0, 0, 0])
    assert_close(state.first["momentum_buffer"], expected, rtol=0, atol=1e-13)


def test_parallel_step_with_fixed_rank_by_hand() -> None:
    gradient = matrix([0, 0, 0], [10, 0, 0], [0, 0, 0])
    core, factors, state = parallel_step(
        TWO, [E1, E1], gradient, rule=SGD(momentum=0.9), lr=0.1, ranks=(1, 1)
    )
    # W_1 = (2, -1, 0)^T e_1^T has rank one already; the momentum 10 e_2 e_1^T stays tangent.
    assert core.shape == (1, 1)
    assert_close(tucker_to_dense(core, factors), matrix([2, 0, 0], [-1, 0, 0], [0, 0, 0]))
    assert_close(state.first["momentum_buffer"], gradient, rtol=0, atol=1e-13)


def test_momentum_is_projected_where_the_weight_has_moved_to() -> None:
    gradient = matrix([0, 10, 0], [10, 0, 0], [0, 0, 0])
    core, factors, state = parallel_step(
        TWO, [E1, E1], gradient, rule=SGD(momentum=0.9), lr=0.1, ranks=(1, 1)
    )
    # W~ = [[2, -1], [-1, 0]] has eigenvalues 1 +- sqrt(2); v is the first eigenvector, n normal.
    v = matrix([1, 1 - 2**0.5, 0]).T / (1 + (1 - 2**0.5) ** 2) ** 0.5
    n = matrix([v[1].item(), -v[0].item(), 0]).T
    assert_close(tucker_to_dense(core, factors), (1 + 2**0.5) * v @ v.T)
    expected = gradient - (n.T @ gradient @ n) * n @ n.T
    assert_close(state.first["momentum_buffer"], expected, rtol=0, atol=1e-13)


def test_bug_step_by_hand() -> None:
    core, factors, _ = bug_step(TWO, [E1, E1], lambda w: GRADIENT, rule=SGD(), lr=0.1, tau=0)
    # D_1 = 5 e_2 and D_2 = 3 e_2: the step is the Euclidean one inside span(e_1, e_2).
    expected = matrix([1.9, -0.3, 0], [-0.5, -0.7, 0], [0, 0, 0])
    assert_close(tucker_to_dense(core, factors), expected, rtol=0, atol=1e-14)


def test_bug_step_with_momentum_by_hand() -> None:
    old = matrix([0, 0, 4], [0, 0, 0], [6, 0, 0])
    state = State(1, {"momentum_buffer": old}, {})
    core, factors, state = bug_step(
        TWO, [E1, E1], lambda w: GRADIENT, state, rule=SGD(momentum=0.5), lr=0.1, tau=0
    )
    # D_1 = (5, 3) and D_2 = (3, 2) on (e_2, e_3); all that happens stays in span(e_1, D_i).
    left = matrix([1, 0, 0], [0, 25 / 34, 15 / 34], [0, 15 / 34, 9 / 34])
    right = matrix([1, 0, 0], [0, 9 / 13, 6 / 13], [0, 6 / 13, 4 / 13])
    direction = left @ matrix([1, 3, 2], [5, 7, 2], [3, 8, 9]) @ right
    assert_close(tucker_to_dense(core, factors), 2 * E1 @ E1.T - 0.1 * direction)
    assert_close(state.first["momentum_buffer"], direction, rtol=0, atol=1e-12)


def test_adam_by_hand() -> None:
    rule = Adam(betas=(0.9, 0.75), eps=1e-13)
    core, factors, state = parallel_step(TWO, [E1, E1], GRADIENT, rule=rule, lr=0.1, tau=0)
    # The first direction of Adam is the sign of each coordinate: 1; (0, 1, 0); (0, 1, 0).
    expected = matrix([1.9, -0.1, 0], [-0.1, 0, 0], [0, 0, 0])
    assert_close(tucker_to_dense(core, factors), expected, rtol=0, atol=1e-14)
    expected = matrix([0.1, 0.3, 0], [0.5, 0, 0], [0, 0, 0])
    assert_close(state.first["exp_avg"], expected, rtol=0, atol=1e-14)
    # v_C = 1/4, v_1 = (0, 25/4, 0), v_2 = (0, 9/4, 0); a single number has to stand for all.
    moved = state.second["exp_avg_sq"]
    assert_close(moved["core"], matrix([1, 1], [1, 1]) / 4)
    assert_close(moved[0], matrix([0, 0], [25, 25], [0, 0]) / 4)
    assert_close(moved[1], matrix([0, 0], [9, 9], [0, 0]) / 4)
    assert state.count == 1


def test_adam_in_bug_by_hand() -> None:
    rule = Adam(betas=(0.9, 0.75), eps=1e-13)
    old = State(
        1,
        {"exp_avg": matrix([2, 0, 0], [4, 0, 0], [0, 0, 0])},
        {"exp_avg_sq": {"core": 4 * TWO, 0: E1, 1: E1}},
    )
    # The basis step completes both bases to (e_1, e_2). There v = 8, m = (2, 0; 4, 0).
    core, factors, state = bug_step(
        TWO, [E1, E1], lambda w: GRADIENT, old, rule=rule, lr=0.1, ranks=(2, 2)
    )
    gradient = GRADIENT[:2, :2]
    mean = 0.9 * matrix([2, 0], [4, 0]) + 0.1 * gradient
    square = 0.75 * 8 + 0.25 * gradient.square()
    direction = mean / (1 - 0.9**2) / (square / (1 - 0.75**2)).sqrt()
    expected = torch.zeros(3, 3).double()
    expected[:2, :2] = matrix([2, 0], [0, 0]) - 0.1 * direction
    assert_close(tucker_to_dense(core, factors), expected, rtol=0, atol=1e-13)
    first = torch.zeros(3, 3).double()
    first[:2, :2] = mean
    assert_close(state.first["exp_avg"], first, rtol=0, atol=1e-13)
    assert_close(state.second["exp_avg_sq"]["core"], square)
    assert state.count == 2


def test_unfactorised_modes_move_freely_and_stay_whole() -> None:
    core, factors = random_tucker((5, 4, 3), (2, 2, 3))
    factors[2] = torch.eye(3, dtype=torch.float64)
    weight, gradient = tucker_to_dense(core, factors), random(5, 4, 3, seed=7)
    new_core, new_factors, _ = parallel_step(
        core, factors, gradient, rule=SGD(), lr=0.1, tau=0, modes=(0, 1)
    )
    expected = weight - 0.1 * tangent_projection(core, factors, gradient)
    assert new_core.shape == (4, 4, 3)
    assert_close(tucker_to_dense(new_core, new_factors), expected, rtol=0, atol=1e-13)
