"""Post-hoc Tucker: decompose a trained dense network, then fine-tune it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tdlrt.experiments.methods.method import Method
from tdlrt.experiments.methods.sizes import dense_sizes, factorizable, largest_share
from tdlrt.ranks import RankSpec, RelativeTolerance
from tdlrt.surgery import FactorizationReport, factorize_

if TYPE_CHECKING:
    from tdlrt.experiments.config import RunConfig
    from tdlrt.experiments.training import Training

__all__ = ["Posthoc"]

LARGEST_TOLERANCE = 1 - 1e-6


class Posthoc(Method):
    """Train dense until `dense_until`, truncate every weight by HOSVD, train cores and bases.

    Size: one relative tolerance for all layers, the smallest with which they fit `budget`.

    Source: Kim et al., arXiv:1511.06530, with a tolerance in place of variational Bayes.
    """

    options = frozenset({"budget", "dense_until"})

    def prepare(self, model: nn.Module, config: RunConfig) -> dict[str, int]:
        """Leave the network dense for now."""
        return dense_sizes(factorizable(model))

    def after_step(self, training: Training) -> None:
        """Decompose the network when its time has come."""
        if training.step != training.dense_steps:
            return

        def plan(share: float, dry_run: bool = True) -> FactorizationReport:
            tolerance = RelativeTolerance(min(1 - share, LARGEST_TOLERANCE))
            return _factorize(training, tolerance, dry_run=dry_run)

        def size(share: float) -> int:
            return sum(row.parameters for row in plan(share).factorized)

        dense = sum(training.layers.values())
        plan(largest_share(size, training.config.budget or 1.0, dense), dry_run=False)
        training.rebuild()

    def restore(self, training: Training, weights: Mapping[str, Tensor]) -> None:
        """Decompose the network if it was when it had these weights; they bring their ranks."""
        if any(f"{name}.core" in weights for name in training.layers):
            _factorize(training, 1)
            training.rebuild()


def _factorize(training: Training, rank: RankSpec, *, dry_run: bool = False) -> FactorizationReport:
    names = list(training.layers)
    return factorize_(training.model, rank=rank, include=names, init_scale=None, dry_run=dry_run)
