"""Rank policies."""

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import tdlrt
from reference import kept_rank
from reference.cases import gaussian, laws, seeds
from tdlrt.linalg import Cutoff, truncate
from tdlrt.ranks import ByName, Candidate, initial_cutoff

VALUES = torch.tensor([16.0, 4.0, 1.0, 0.25, 0.01, 0.0])
NORM = float(VALUES.sum())


def keep(policy, modes=(0, 1), ranks=(6, 6, 6), step=1):
    candidate = Candidate(ranks, ranks, ranks, modes, NORM)
    cutoff = policy.cutoffs({"layer": candidate}, step)["layer"]
    return kept_rank(VALUES, 0, cutoff, len(ranks), modes)


@pytest.mark.parametrize(
    ("tau", "rank"), [(0.0, 6), (1e-6, 5), (0.1, 4), (0.16, 3), (0.4, 2), (0.9, 1)]
)
def test_smallest_rank_within_the_share_of_a_mode(tau, rank):
    assert keep(tdlrt.RelativeTolerance(tau)) == rank


def test_a_matrix_spends_the_whole_budget_at_once():
    policy = tdlrt.RelativeTolerance(0.23)  # tau^2 ||C||^2 = 1.12, half of it 0.56
    assert keep(policy) == 3
    assert keep(tdlrt.RelativeTolerance(0.25), ranks=(6, 6)) == 2
    assert keep(tdlrt.RelativeTolerance(0.25)) == 3


@pytest.mark.parametrize(
    ("bounds", "rank"),
    [
        ({"min_rank": 5}, 5),
        ({"max_rank": 2}, 2),
        ({"multiple_of": 4}, 4),
        ({"multiple_of": 5}, 5),
        ({"multiple_of": 8}, 6),
        ({"multiple_of": 4, "max_rank": 3}, 3),
        ({"min_rank": 9}, 6),
    ],
)
def test_bounds(bounds, rank):
    assert keep(tdlrt.RelativeTolerance(0.16, **bounds)) == rank


def test_fixed_rank_keeps_what_is_there():
    assert keep(tdlrt.FixedRank(), ranks=(4, 5, 6)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_rank": 0}, "min_rank: got 0, expected an int of at least 1"),
        ({"max_rank": 1.5}, "max_rank: got 1.5"),
        ({"multiple_of": True}, "multiple_of: got True"),
        ({"min_rank": 4, "max_rank": 3}, "max_rank: got 3, below min_rank=4"),
    ],
)
def test_bad_bounds(options, message):
    with pytest.raises(tdlrt.RankError, match=message):
        tdlrt.RelativeTolerance(0.1, **options)


@pytest.mark.parametrize(
    ("policy", "needed"),
    [
        (tdlrt.FixedRank(), False),
        (tdlrt.RelativeTolerance(0.1), False),
        (tdlrt.ParameterBudget(0.1), True),
        (ByName({"a": tdlrt.FixedRank(), "b": tdlrt.RelativeTolerance(0.1)}), False),
        (ByName({"a": tdlrt.FixedRank(), "b": tdlrt.ParameterBudget(0.1)}), True),
    ],
)
def test_only_a_budget_needs_spectra(policy, needed):
    assert policy.needs_spectra is needed


def test_the_cutoff_of_a_tolerance():
    policy = tdlrt.RelativeTolerance(
        tdlrt.LinearSchedule(0.0, 0.4, steps=4), min_rank=2, multiple_of=3, spare=0.5
    )
    expected = Cutoff((8, 7, 3), tau=0.4, min_rank=2, multiple_of=3, spare=0.5)
    assert policy.cutoff((8, 7, 3), 4) == expected
    assert policy.cutoff((8, 7, 3)) == expected._replace(tau=0.0)  # the start of the schedule
    bounded = dataclasses.replace(policy, max_rank=5)
    assert bounded.cutoff((8, 7, 3), 4) == expected._replace(limits=(5, 5, 5))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("full", Cutoff((8, 7, 3))),
        (0.5, Cutoff((4, 4, 3))),
        (5, Cutoff((5, 5, 3))),
        ((2, 7, 1), Cutoff((2, 7, 1))),
        (tdlrt.RelativeTolerance(0.1, max_rank=4), Cutoff((4, 4, 4), tau=0.1)),
    ],
)
def test_the_cutoff_at_the_start(spec, expected):
    assert initial_cutoff(spec, (8, 7, 3)) == expected


def test_policies_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tdlrt.RelativeTolerance(0.1).tau = 0.2


# --- schedules ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (
            tdlrt.LinearSchedule(0.0, 0.4, steps=4),
            {0: 0.0, 1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 99: 0.4},
        ),
        (tdlrt.LinearSchedule(0.4, 0.0, steps=4), {0: 0.4, 1: 0.3, 4: 0.0, 5: 0.0}),
        (tdlrt.CubicSchedule(0.0, 0.8, steps=2), {0: 0.0, 1: 0.7, 2: 0.8, 50: 0.8}),
        (tdlrt.CubicSchedule(0.8, 0.0, steps=4), {0: 0.8, 1: 0.3375, 2: 0.1, 3: 0.0125, 4: 0.0}),
        (tdlrt.LinearSchedule(3, 1, steps=1), {0: 3, 1: 1, 2: 1}),
    ],
)
def test_values_of_a_schedule(schedule, values):
    for step, value in values.items():
        assert schedule.value(step) == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize("tau", [tdlrt.LinearSchedule, tdlrt.CubicSchedule])
def test_a_tolerance_follows_its_schedule(tau):
    policy = tdlrt.RelativeTolerance(tau(0.0, 0.4, steps=10))
    ranks = [keep(policy, step=step) for step in range(1, 13)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-3:] == [keep(tdlrt.RelativeTolerance(0.4))] * 3 == [2, 2, 2]
    assert ranks[0] > 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tdlrt.LinearSchedule(0, 1, steps=0), "steps: got 0, expected an int of at least"),
        (
            lambda: tdlrt.CubicSchedule(float("nan"), 1, steps=3),
            "start: got nan, expected a finite",
        ),
        (lambda: tdlrt.CubicSchedule(0, float("inf"), steps=3), "end: got inf"),
        (lambda: tdlrt.LinearSchedule(0, "1", steps=3), "end: got '1'"),
        (
            lambda: tdlrt.RelativeTolerance(tdlrt.LinearSchedule(0, 1, steps=3)),
            r"tau: got LinearSchedule.*expected a number in \[0, 1\)",
        ),
        (
            lambda: tdlrt.ParameterBudget(tdlrt.LinearSchedule(1, 0, steps=3)),
            r"fraction: got LinearSchedule.*expected a number in \(0, 1\]",
        ),
        (
            lambda: tdlrt.ParameterBudget(parameters=tdlrt.LinearSchedule(100, 0, steps=3)),
            "parameters: got LinearSchedule.*expected a number from 1",
        ),
    ],
)
def test_bad_schedules(make, message):
    with pytest.raises(tdlrt.RankError, match=message):
        make()


# --- spare ranks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"spare": 0.0}, 3),
        ({"spare": 0.01}, 4),  # rounded up
        ({"spare": 0.5}, 5),
        ({"spare": 9.0}, 6),  # no more than there are
        ({"spare": 0.5, "max_rank": 4}, 4),
        ({"spare": 0.01, "multiple_of": 3}, 6),
    ],
)
def test_spare_ranks_come_on_top(options, rank):
    policy = tdlrt.RelativeTolerance(0.16, **options)
    assert keep(policy) == rank
    if policy.spare:
        assert policy.settled() == dataclasses.replace(policy, spare=0.0)
    assert policy.settled().settled() == tdlrt.FixedRank()


@pytest.mark.parametrize("spare", [-0.1, float("nan"), float("inf"), "0.1", True])
@pytest.mark.parametrize("make", [tdlrt.RelativeTolerance, tdlrt.ParameterBudget])
def test_bad_spare(make, spare):
    with pytest.raises(tdlrt.RankError, match=r"spare: got .* expected a share of at least 0"):
        make(0.1, spare=spare)


# --- budgets ------------------------------------------------------------------------------------


def parameters_of(ranks, shape, modes):
    return math.prod(ranks) + sum(shape[mode] * ranks[mode] for mode in modes)


def squared_values(core, mode):
    """sigma_k^2 / ||C||^2 of Mat_i(C), by an SVD; zeros of a zero core."""
    rows = core.double().movedim(mode, 0).flatten(1)
    squares = torch.zeros(len(rows), dtype=torch.float64)
    squares[: min(rows.shape)] = torch.linalg.svdvals(rows).square()
    return squares / max(float(core.double().square().sum()), torch.finfo(torch.float64).tiny)


def candidate_of(core, shape, modes, **options):
    """A layer as a policy sees it whose core is in the bases that it keeps directions from."""
    return Candidate(
        tuple(core.shape),
        tuple(core.shape),
        shape,
        modes,
        squared_norm=float(core.double().square().sum()),
        spectra={mode: squared_values(core, mode).tolist() for mode in modes},
        **options,
    )


def chosen(policy, candidates, step=1):
    """Ranks that a policy asks for, mode by mode, of every candidate."""
    cutoffs = policy.cutoffs(candidates, step)
    return {
        name: [
            kept_rank(torch.zeros(size), mode, cutoffs[name], len(c.shape), c.modes)
            if mode in c.modes
            else size
            for mode, size in enumerate(c.available)
        ]
        for name, c in candidates.items()
    }


def greedy(candidates, cores, limit, multiple_of=1, min_rank=1):
    """The slow twin: all cuts priced anew before every one of them; then what fits comes back."""
    ranks = {name: list(core.shape) for name, core in cores.items()}
    cuts = []
    weights = {
        name: math.sqrt(c.curvature) * float(cores[name].double().norm())
        for name, c in candidates.items()
        if c.curvature is not None
    }
    mean = sum(weights.values()) / len(weights) if weights else 1.0
    values = {
        (name, mode): weights.get(name, mean) / mean * squared_values(cores[name], mode)
        for name, c in candidates.items()
        for mode in c.modes
    }

    def total():
        return sum(parameters_of(ranks[n], c.shape, c.modes) for n, c in candidates.items())

    while total() > limit:
        offers = []
        for index, (name, candidate) in enumerate(candidates.items()):
            available = cores[name].shape
            matrix = len(available) == 2
            for group in [tuple(candidate.modes)] if matrix else [(m,) for m in candidate.modes]:
                mode = min(group, key=lambda m: available[m])
                rank, size = min(ranks[name][m] for m in group), available[mode]
                lowest = min(math.ceil(min_rank / multiple_of) * multiple_of, size)
                if rank > lowest:
                    smaller = max((rank - 1) // multiple_of * multiple_of, lowest)
                    cut = [smaller if m in group else r for m, r in enumerate(ranks[name])]
                    saved = parameters_of(ranks[name], candidate.shape, candidate.modes)
                    saved -= parameters_of(cut, candidate.shape, candidate.modes)
                    price = float(values[name, mode][smaller:rank].sum()) / saved
                    offers.append((price, index, name, cut))
        _, _, name, cut = min(offers)
        cuts.append(
            (
                name,
                [
                    (m, a, b)
                    for m, (a, b) in enumerate(zip(ranks[name], cut, strict=True))
                    if a != b
                ],
            )
        )
        ranks[name] = cut
    refused = []
    for name, changes in reversed(cuts):
        cut = list(ranks[name])
        if all(cut[mode] == after for mode, _, after in changes):
            for mode, before, _ in changes:
                ranks[name][mode] = before
            if total() > limit:
                ranks[name] = cut
                refused.append(name)
    return ranks, total(), refused


@st.composite
def networks(draw):
    """One to three layers with augmented cores, as a policy sees them in a step, and the cores."""
    candidates, cores = {}, {}
    for number in range(draw(st.integers(1, 3))):
        order = draw(st.sampled_from([4, 2, 3]))
        shape = tuple(draw(st.integers(2, 9 if order == 2 else 6)) for _ in range(order))
        ranks = [n - draw(st.integers(0, n - 1)) for n in shape]
        modes = tuple(range(order))
        if order > 2 and draw(st.booleans()):
            modes, ranks[2:] = (0, 1), shape[2:]
        ranks = [min(ranks)] * 2 if order == 2 else ranks
        core = gaussian(ranks, draw(seeds)) * draw(st.sampled_from([1.0, 1e-3, 100.0]))
        curvature = draw(st.sampled_from([None, 0.3, 1e-4]))
        candidates[f"layer{number}"] = candidate_of(core, shape, modes, curvature=curvature)
        cores[f"layer{number}"] = core
    return candidates, cores


@laws
@given(
    networks(),
    st.sampled_from([0.5, 0.3, 0.7, 0.1, 0.9, 0.0, 1.0]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
)
def test_a_budget_is_spent_greedily_and_never_exceeded(drawn, share, multiple_of, min_rank):
    network, cores = drawn
    # A tensor with two modes that are longer than 1 is a matrix: both have the same values, a tie.
    sizes = [core.shape for core in cores.values() if core.ndim > 2]
    assume(all(sum(n > 1 for n in shape) != 2 for shape in sizes))
    bounds = {"multiple_of": multiple_of, "min_rank": min_rank}
    with pytest.raises(tdlrt.RankError, match="parameters: got 1, but the smallest") as refused:
        tdlrt.ParameterBudget(parameters=1, **bounds).check(network)
    smallest = int(re.search(r"budget is (\d+) parameters", str(refused.value))[1])
    largest = sum(parameters_of(c.available, c.shape, c.modes) for c in network.values())
    limit = round(smallest + share * max(0, largest - smallest))
    policy = tdlrt.ParameterBudget(parameters=limit, **bounds)
    policy.check(network)
    with pytest.raises(tdlrt.RankError):
        tdlrt.ParameterBudget(parameters=max(1, smallest - 1), **bounds).check(network)

    ranks, total, refused = greedy(network, cores, limit, **bounds)
    assert chosen(policy, network) == ranks
    assert total <= limit
    assert refused or total == largest or multiple_of > 1  # nothing was cut without need

    kept = 0
    for name, cutoff in policy.cutoffs(network, 1).items():
        candidate = network[name]
        core, _ = truncate(cores[name], cutoff, candidate.modes)
        kept += parameters_of(core.shape, candidate.shape, candidate.modes)
    assert kept <= limit


def diagonal(*values):
    """A matrix candidate of size 10 x 10 with these singular values."""
    core = torch.diag(torch.tensor(values, dtype=torch.float64))
    return candidate_of(core, (10, 10), (0, 1))


def test_the_cheapest_direction_goes_first():
    """A rank of a matrix costs 20 and what it takes from the core: 3^2 -> 2^2 -> 1."""
    layers = {"large": diagonal(100.0, 40.0, 30.0), "small": diagonal(1.0, 0.9, 0.2)}
    assert parameters_of([3, 3], (10, 10), (0, 1)) == 69
    ranks = []
    for limit in (138, 137, 113, 112, 89, 65, 64):
        asked = chosen(tdlrt.ParameterBudget(parameters=limit), layers)
        ranks.append({name: both[0] for name, both in asked.items()})
    # Shares of ||C||^2: large 0.80, 0.128, 0.072; small 0.54, 0.44, 0.02.
    assert ranks == [
        {"large": 3, "small": 3},
        {"large": 3, "small": 2},
        {"large": 3, "small": 2},
        {"large": 2, "small": 2},
        {"large": 2, "small": 2},
        {"large": 1, "small": 2},
        {"large": 1, "small": 1},
    ]


def test_what_still_fits_after_a_large_cut_is_taken_back():
    """The small layer goes first and is too small; the large one's cut leaves room for it again."""
    wide = candidate_of(torch.diag(torch.tensor([10.0, 4.0])), (100, 100), (0, 1))
    layers = {"wide": wide, "small": diagonal(1.0, 0.1, 0.1)}
    full = parameters_of([2, 2], (100, 100), (0, 1)) + parameters_of([3, 3], (10, 10), (0, 1))
    ranks = chosen(tdlrt.ParameterBudget(parameters=full - 60), layers)
    assert ranks == {"wide": [1, 1], "small": [3, 3]}


def test_a_layer_that_the_loss_depends_on_more_keeps_more():
    """Worth sigma^2 sqrt(F) / ||C||: 4 times the gradient buys as much as twice sigma."""
    one = diagonal(10.0, 1.0)

    def second_to_go(ratio, scale=1.0, curvature=0.3):
        layers = {
            "a": one._replace(curvature=curvature),
            "b": diagonal(10.0 * scale, scale)._replace(curvature=curvature * (ratio / scale) ** 2),
        }
        limit = parameters_of([2, 2], (10, 10), (0, 1)) + parameters_of([1, 1], (10, 10), (0, 1))
        ranks = chosen(tdlrt.ParameterBudget(parameters=limit), layers)
        return next(name for name, both in ranks.items() if both == [1, 1])

    for scale in (1.0, 0.1, 10.0):  # of the layer alone changes nothing
        assert second_to_go(0.99, scale) == "b"
        assert second_to_go(1.01, scale) == "a"
    assert second_to_go(1.01, curvature=1e-30) == "a"

    # a: sigma^2 share 1 / 101; b: 4 / 104, worth the same at sqrt(F) ||C|| smaller by 3.88.
    weaker = {"a": one, "b": diagonal(10.0, 2.0)}
    norms = [101**0.5, 104**0.5]
    for factor, gone in ((3.87, "a"), (3.89, "b")):
        layers = {
            name: layer._replace(curvature=(weight / norm) ** 2)
            for (name, layer), norm, weight in zip(
                weaker.items(), norms, (factor, 1.0), strict=True
            )
        }
        ranks = chosen(tdlrt.ParameterBudget(parameters=67), layers)
        assert ranks[gone] == [1, 1]


def test_a_layer_of_unknown_curvature_counts_like_the_mean():
    layers = {
        "known": diagonal(10.0, 1.0)._replace(curvature=1e-12),
        "unknown": diagonal(10.0, 1.01),
        "dead": diagonal(10.0, 1.02)._replace(curvature=0.0),
    }
    ranks = chosen(tdlrt.ParameterBudget(parameters=44 + 44 + 21), layers)
    assert ranks == {"known": [1, 1], "unknown": [2, 2], "dead": [2, 2]}


def test_a_resting_layer_keeps_its_ranks_and_the_others_share_the_rest():
    layers = {"moving": diagonal(3.0, 2.0, 1.0), "resting": diagonal(3.0, 2.0, 1.0)}
    layers["resting"] = layers["resting"]._replace(resting=True)
    ranks = chosen(tdlrt.ParameterBudget(parameters=69 + 44), layers)
    assert ranks == {"moving": [2, 2], "resting": [3, 3]}


def test_a_matrix_loses_both_modes_together_and_an_unfactorised_mode_nothing():
    layers = {
        "linear": diagonal(3.0, 2.0, 1.0),
        "conv": candidate_of(gaussian((4, 4, 3), 0), (8, 8, 3), (0, 1)),
    }
    for limit in range(46, 200, 7):
        ranks = chosen(tdlrt.ParameterBudget(parameters=limit), layers)
        assert ranks["linear"][0] == ranks["linear"][1]
        assert ranks["conv"][2] == 3


def test_fraction_is_a_share_of_the_dense_weights():
    layers = {"a": diagonal(3.0, 2.0, 1.0), "b": diagonal(3.0, 2.0, 1.0)}
    by_fraction = chosen(tdlrt.ParameterBudget(0.45), layers)
    assert by_fraction == chosen(tdlrt.ParameterBudget(parameters=90), layers)
    assert by_fraction == {"a": [2, 2], "b": [2, 2]}  # 2 (20 + 20 + 4) = 88


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({}, 4),
        ({"max_rank": 2}, 2),
        ({"multiple_of": 3}, 3),
        ({"min_rank": 5}, 5),
        ({"spare": 0.25}, 5),
    ],
)
def test_bounds_of_a_budget(options, rank):
    layers = {"a": diagonal(6.0, 5.0, 4.0, 3.0, 2.0, 1.0)}
    parameters = 125 if "min_rank" in options else 100  # rank 4 needs 96, rank 5 125
    policy = tdlrt.ParameterBudget(parameters=parameters, **options)
    policy.check(layers)
    assert chosen(policy, layers) == {"a": [rank, rank]}


def test_a_budget_follows_its_schedule():
    layers = {"a": diagonal(6.0, 5.0, 4.0, 3.0, 2.0, 1.0)}
    policy = tdlrt.ParameterBudget(tdlrt.LinearSchedule(1.0, 0.21, steps=5))
    ranks = [chosen(policy, layers, step)["a"][0] for step in range(1, 8)]
    # (1 - 0.158 t) 100 parameters, for 21, 44, 69 and 96 at ranks 1 to 4
    assert ranks == [3, 2, 2, 1, 1, 1, 1]


def test_a_budget_too_small_names_the_smallest_possible_one():
    layers = {"a": diagonal(3.0, 2.0, 1.0), "b": diagonal(3.0, 2.0, 1.0)}
    tdlrt.ParameterBudget(parameters=42).check(layers)
    tdlrt.ParameterBudget(0.21).check(layers)
    for policy, name in (
        (tdlrt.ParameterBudget(parameters=41), "parameters: got 41"),
        (tdlrt.ParameterBudget(0.2), "fraction: got 0.2"),
        (tdlrt.ParameterBudget(tdlrt.LinearSchedule(0.9, 0.2, steps=9)), "fraction: got 0.2"),
    ):
        with pytest.raises(tdlrt.RankError, match=f"{name}, but .* is 42 parameters, .* of 0.21 "):
            policy.check(layers)


def test_the_smallest_budget_of_a_flat_matrix_has_one_rank():
    flat = candidate_of(torch.ones(4, 4), (4, 100), (0, 1))
    tdlrt.ParameterBudget(parameters=4 * 4 + 4 * 104, multiple_of=8).check({"flat": flat})


def test_a_zero_core_shares_a_budget():
    layers = {"zero": diagonal(0.0, 0.0, 0.0), "other": diagonal(3.0, 2.0, 1.0)}
    assert chosen(tdlrt.ParameterBudget(0.45), layers) == {"zero": [1, 1], "other": [3, 3]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got fraction=None and parameters=None; give exactly one"),
        ({"fraction": 0.1, "parameters": 10}, "got fraction=0.1 and parameters=10; give exactly"),
        ({"fraction": 0.0}, r"fraction: got 0.0, expected a number in \(0, 1\]"),
        ({"fraction": 1.1}, "fraction: got 1.1"),
        ({"fraction": "0.1"}, "fraction: got '0.1'"),
        ({"parameters": 0}, "parameters: got 0, expected a number from 1"),
        ({"parameters": float("nan")}, "parameters: got nan"),
        ({"parameters": True}, "parameters: got True"),
        ({"fraction": 0.1, "min_rank": 0}, "min_rank: got 0"),
        ({"fraction": 0.1, "max_rank": 2, "min_rank": 3}, "max_rank: got 2, below min_rank=3"),
    ],
)
def test_bad_budgets(options, message):
    with pytest.raises(tdlrt.RankError, match=message):
        tdlrt.ParameterBudget(**options)


# --- policies by name ---------------------------------------------------------------------------


def test_the_first_pattern_that_matches_wins_and_the_others_keep_their_ranks():
    layers = {name: diagonal(4.0, 3.0, 2.0, 1.0) for name in ("conv1", "conv2", "fc1", "fc2")}
    layers = {name: layer._replace(ranks=(3, 3)) for name, layer in layers.items()}
    policy = ByName(
        {
            "conv1": tdlrt.RelativeTolerance(0.0, max_rank=1),
            "conv*": tdlrt.RelativeTolerance(0.0, max_rank=2),
            "*2": tdlrt.RelativeTolerance(0.0),
        }
    )
    policy.check(layers)
    ranks = {name: ranks[0] for name, ranks in chosen(policy, layers).items()}
    assert ranks == {"conv1": 1, "conv2": 2, "fc1": 3, "fc2": 4}


def test_a_budget_by_name_counts_its_own_layers():
    layers = {name: diagonal(3.0, 2.0, 1.0) for name in ("a1", "a2", "b")}
    policy = ByName({"a*": tdlrt.ParameterBudget(0.45), "b": tdlrt.ParameterBudget(0.7)})
    assert chosen(policy, layers) == {"a1": [2, 2], "a2": [2, 2], "b": [3, 3]}


def test_a_pattern_without_a_layer_and_a_policy_that_is_none():
    layers = {"fc1": diagonal(1.0), "fc2": diagonal(1.0)}
    with pytest.raises(
        tdlrt.NothingMatchedError, match=r"rank_policy\['conv\*'\]: matches none.* fc1, fc2"
    ):
        ByName({"*": tdlrt.FixedRank(), "conv*": tdlrt.FixedRank()}).check(layers)
    with pytest.raises(tdlrt.RankError, match=r"rank_policy\['fc1'\]: got 0.1, expected a rank"):
        ByName({"fc1": 0.1})
    with pytest.raises(tdlrt.RankError, match=r"fraction: got 0\.1, but the smallest"):
        ByName({"fc2": tdlrt.ParameterBudget(0.1)}).check(layers)


def test_a_pattern_whose_layers_are_all_taken():
    layers = {name: diagonal(2.0, 1.0) for name in ("conv1", "fc1")}
    policies = {"*": tdlrt.FixedRank(), "conv*": tdlrt.RelativeTolerance(0.1)}
    message = r"rank_policy\['conv\*'\]: earlier patterns take all of its layers; put it before"
    with pytest.raises(tdlrt.NothingMatchedError, match=message):
        ByName(policies).check(layers)
    ByName(dict(reversed(policies.items()))).check(layers)


def test_settled_policies_by_name():
    policy = ByName({"a": tdlrt.ParameterBudget(0.5, spare=0.1), "*": tdlrt.FixedRank()})
    expected = ByName({"a": tdlrt.ParameterBudget(0.5), "*": tdlrt.FixedRank()})
    assert policy.settled() == expected == expected.settled()
