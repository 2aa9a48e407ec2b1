"""The budget: what it keeps, against a slow twin."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import tdlrt
from ranks.candidates import candidate_of, chosen, diagonal, parameters_of, squared_values
from reference.cases import gaussian, laws, seeds
from tdlrt.linalg import truncate


def greedy(candidates, cores, limit, **bounds):
    """The slow twin: first each layer is cut to its dense size, then all are cut to the limit."""
    ranks = {name: list(core.shape) for name, core in cores.items()}
    for name, candidate in candidates.items():
        cut_to_fit(candidates, cores, ranks, [name], candidate.dense_parameters, **bounds)
    capped = parameters_together(candidates, ranks, candidates)
    return ranks, capped, *cut_to_fit(candidates, cores, ranks, candidates, limit, **bounds)


def worths(shares):
    """What is kept of the energy when directions go one by one, as logarithms of its ratios."""
    kept = [float(shares[: k + 1].sum()) for k in range(len(shares))]
    ratios = [math.log(b / a) if a > 0 else 0.0 for a, b in itertools.pairwise(kept)]
    return torch.tensor([float(shares[0]), *ratios], dtype=torch.float64)


def parameters_together(candidates, ranks, names):
    return sum(parameters_of(ranks[n], candidates[n].shape, candidates[n].modes) for n in names)


def cut_to_fit(candidates, cores, ranks, names, limit, multiple_of=1, min_rank=1):
    """All cuts priced anew before every one of them; then what fits comes back."""
    cuts = []
    weights = {
        name: math.sqrt(c.curvature) * float(cores[name].double().norm())
        for name, c in candidates.items()
        if c.curvature is not None
    }
    mean = sum(weights.values()) / len(weights) if weights else 1.0
    values = {
        (name, mode): weights.get(name, mean) / mean * worths(squared_values(cores[name], mode))
        for name, c in candidates.items()
        for mode in c.modes
    }

    def total():
        return parameters_together(candidates, ranks, names)

    while total() > limit:
        offers = []
        for index, name in enumerate(names):
            candidate = candidates[name]
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
        if not offers:  # even the smallest ranks are larger than dense
            break
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
    return total(), refused


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
    with pytest.raises(
        tdlrt.RankError, match="budget: got 1 parameters, but the smallest"
    ) as refused:
        tdlrt.ParameterBudget(parameters=1, **bounds).check(network)
    smallest = int(re.search(r"budget is (\d+) parameters", str(refused.value))[1])
    largest = sum(parameters_of(c.available, c.shape, c.modes) for c in network.values())
    limit = round(smallest + share * max(0, largest - smallest))
    policy = tdlrt.ParameterBudget(parameters=limit, **bounds)
    policy.check(network)
    with pytest.raises(tdlrt.RankError):
        tdlrt.ParameterBudget(parameters=max(1, smallest - 1), **bounds).check(network)

    ranks, capped, total, refused = greedy(network, cores, limit, **bounds)
    assert chosen(policy, network) == ranks
    assert total <= limit
    assert refused or total == capped or multiple_of > 1  # nothing was cut without need
    for name, candidate in network.items():
        lowest = [policy.smallest_rank(n) for n in candidate.available]
        smallest = parameters_of(lowest, candidate.shape, candidate.modes)
        kept = parameters_of(ranks[name], candidate.shape, candidate.modes)
        assert kept <= max(candidate.dense_parameters, smallest)

    kept = 0
    for name, cutoff in policy.cutoffs(network, 1).items():
        candidate = network[name]
        core, _ = truncate(cores[name], cutoff, candidate.modes)
        kept += parameters_of(core.shape, candidate.shape, candidate.modes)
    assert kept <= limit


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
    """Worth sqrt(F) ||C|| log(E_2 / E_1): 4 times the gradient buys nearly as much as 2 sigma."""
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

    # a: log(101 / 100); b: log(104 / 100), worth the same at sqrt(F) ||C|| smaller by 3.94.
    weaker = {"a": one, "b": diagonal(10.0, 2.0)}
    norms = [101**0.5, 104**0.5]
    for factor, gone in ((3.93, "a"), (3.95, "b")):
        layers = {
            name: layer._replace(curvature=(weight / norm) ** 2)
            for (name, layer), norm, weight in zip(
                weaker.items(), norms, (factor, 1.0), strict=True
            )
        }
        ranks = chosen(tdlrt.ParameterBudget(parameters=67), layers)
        assert ranks[gone] == [1, 1]


def test_a_layer_whose_directions_are_all_alike_is_not_emptied():
    """Flat spectra: E_k = k, and a rank r is worth sensitivity / r: ranks are as sensitivities."""
    flat = candidate_of(torch.eye(8), (40, 40), (0, 1))
    layers = {"a": flat._replace(curvature=1.0), "b": flat._replace(curvature=4.0)}
    for small, large in ((4, 8), (3, 6), (2, 4)):
        limit = sum(parameters_of([r, r], (40, 40), (0, 1)) for r in (small, large))
        ranks = chosen(tdlrt.ParameterBudget(parameters=limit), layers)
        assert ranks == {"a": [small, small], "b": [large, large]}


def test_a_layer_of_unknown_curvature_counts_like_the_mean():
    layers = {
        "known": diagonal(10.0, 1.0)._replace(curvature=1e-12),
        "unknown": diagonal(10.0, 1.01),
        "dead": diagonal(10.0, 1.02)._replace(curvature=0.0),
    }
    ranks = chosen(tdlrt.ParameterBudget(parameters=44 + 44 + 21), layers)
    assert ranks == {"known": [1, 1], "unknown": [2, 2], "dead": [2, 2]}


def test_a_resting_layer_keeps_its_ranks_and_the_others_get_the_rest_or_their_share():
    layers = {"moving": diagonal(3.0, 2.0, 1.0), "resting": diagonal(3.0, 2.0, 1.0)}
    layers["resting"] = layers["resting"]._replace(resting=True)  # with 69 parameters
    for budget, rank in ((69 + 69, 3), (69 + 44, 2), (44 + 44, 2), (21 + 21, 1)):
        ranks = chosen(tdlrt.ParameterBudget(parameters=budget), layers)
        assert ranks == {"moving": [rank, rank], "resting": [3, 3]}


def test_a_frozen_layer_counts_in_full():
    layers = {"moving": diagonal(3.0, 2.0, 1.0), "frozen": diagonal(3.0, 2.0, 1.0)}
    layers["frozen"] = layers["frozen"]._replace(resting=True, frozen=True)  # with 69 parameters
    for budget, rank in ((69 + 69, 3), (69 + 44, 2), (69 + 43, 1), (69 + 21, 1)):
        ranks = chosen(tdlrt.ParameterBudget(parameters=budget), layers)
        assert ranks == {"moving": [rank, rank], "frozen": [3, 3]}
    tdlrt.ParameterBudget(parameters=92).check(layers)
    with pytest.raises(tdlrt.RankError, match="frozen layers keep 69; that leaves"):
        tdlrt.ParameterBudget(parameters=91).check(layers)
    with pytest.raises(tdlrt.RankError, match=r"smallest possible budget is 90 .*layers keep 69"):
        tdlrt.ParameterBudget(parameters=89).check(layers)


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
        ({"parameters": 69, "spare": 0.4}, 4),
        ({"parameters": 1000}, 4),  # never more than the 100 parameters of the dense weight
    ],
)
def test_bounds_of_a_budget(options, rank):
    layers = {"a": diagonal(6.0, 5.0, 4.0, 3.0, 2.0, 1.0)}
    parameters = 125 if "min_rank" in options else 100  # rank 3 needs 69, rank 4 96, rank 5 125
    policy = tdlrt.ParameterBudget(**{"parameters": parameters, **options})
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
        (tdlrt.ParameterBudget(parameters=41), "budget: got 41 parameters"),
        (tdlrt.ParameterBudget(0.2), "budget: got 0.2"),
        (
            tdlrt.ParameterBudget(tdlrt.LinearSchedule(0.9, 0.2, steps=9)),
            "budget: got 0.2",
        ),
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
