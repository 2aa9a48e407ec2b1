"""Policies that are no part of the library."""

from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from torch import nn

import tdlrt
from ranks.candidates import candidate_of, chosen
from tdlrt.linalg import Cutoff
from tdlrt.ranks import RankPolicy


@dataclass(frozen=True)
class Halved(RankPolicy):
    """Half of every rank at some steps; it reads nothing."""

    steps: tuple[int, ...]

    needs_spectra = False

    def cutoffs(self, candidates, step):
        divisor = 2 if step in self.steps else 1
        return {
            name: Cutoff(tuple(max(1, rank // divisor) for rank in candidate.ranks))
            for name, candidate in candidates.items()
        }


@dataclass(frozen=True)
class KeptShare(RankPolicy):
    """The fewest directions of every mode that hold a share of ||C||^2."""

    share: float

    def cutoffs(self, candidates, step):
        return {name: Cutoff(self.ranks(layer)) for name, layer in candidates.items()}

    def ranks(self, layer):
        ranks = list(layer.ranks)
        for mode in () if layer.resting else layer.modes:
            held = accumulate(layer.spectra[mode])
            ranks[mode] = 1 + sum(total < self.share for total in held)
        return tuple(ranks)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 24), nn.Linear(24, 5)
    )
    tdlrt.factorize_(model, rank=0.5)
    return model


def ranks_of(model):
    return tdlrt.summary(model).ranks


def train(model, optimizer, steps):
    """The ranks after every step."""
    found = []
    x, y = torch.randn(8, 3, 8, 8), torch.randint(5, (8,))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        found.append(ranks_of(model))
    return found


@pytest.mark.parametrize("integrator", ["parallel", "bug"])
def test_ranks_are_halved_at_the_steps_that_a_policy_names(integrator):
    model = network()
    before = ranks_of(model)
    assert before == {"0": (8, 3, 3, 3), "3": (12, 12)}
    options = {"lr": 0.05, "integrator": integrator, "rank_policy": Halved((2, 4))}
    optimizer = tdlrt.TDLRT(model, torch.optim.SGD, **options)
    passes = 1 if integrator == "parallel" else 2
    after = train(model, optimizer, 5 * passes)[passes - 1 :: passes]
    halves = {"0": (1, 1, 1, 1), "3": (6, 6)}  # (4, 1, 1, 1) cut to the product of the others
    assert after == [before, halves, halves, {"0": (1, 1, 1, 1), "3": (3, 3)}, after[3]]
    optimizer.freeze_ranks()
    assert train(model, optimizer, passes)[-1] == after[3]


def test_a_policy_that_reads_singular_values_is_given_them():
    core = torch.zeros(3, 2, 2)
    core[0, 0, 0], core[1, 1, 0], core[2, 1, 1] = 3.0, 2.0, 1.0  # shares 9, 4 and 1 of 14
    layer = candidate_of(core, (9, 8, 2), (0, 1))
    assert chosen(KeptShare(0.6), {"layer": layer}) == {"layer": [1, 1, 2]}
    assert chosen(KeptShare(0.7), {"layer": layer}) == {"layer": [2, 2, 2]}
    assert chosen(KeptShare(0.95), {"layer": layer}) == {"layer": [3, 2, 2]}

    model = network()
    optimizer = tdlrt.TDLRT(model, torch.optim.Adam, lr=0.01, rank_policy=KeptShare(0.6))
    *_, after = train(model, optimizer, 3)
    for name, layer in ((name, model.get_submodule(name)) for name in after):
        assert layer.ranks[0] < {"0": 8, "3": 12}[name]
        layer.check_invariants()


def test_a_policy_of_one_s_own_by_name_and_its_defaults():
    model = network()
    policy = {"0": Halved((1,)), "*": tdlrt.FixedRank()}
    optimizer = tdlrt.TDLRT(model, torch.optim.SGD, lr=0.05, rank_policy=policy)
    assert train(model, optimizer, 1) == [{"0": (1, 1, 1, 1), "3": (12, 12)}]
    Halved((1,)).check({})
    assert Halved((1,)).settled() == tdlrt.FixedRank()
    assert KeptShare(0.5).needs_spectra
