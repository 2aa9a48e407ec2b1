"""Layers as a policy sees them, and the ranks that it asks for."""

import math

import torch

from reference import kept_rank
from tdlrt.ranks import Candidate

VALUES = torch.tensor([16.0, 4.0, 1.0, 0.25, 0.01, 0.0])
NORM = float(VALUES.sum())


def keep(policy, modes=(0, 1), ranks=(6, 6, 6), step=1):
    candidate = Candidate(ranks, ranks, ranks, modes, NORM)
    cutoff = policy.cutoffs({"layer": candidate}, step)["layer"]
    return kept_rank(VALUES, 0, cutoff, len(ranks), modes)


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


def diagonal(*values):
    """A matrix candidate of size 10 x 10 with these singular values."""
    core = torch.diag(torch.tensor(values, dtype=torch.float64))
    return candidate_of(core, (10, 10), (0, 1))
