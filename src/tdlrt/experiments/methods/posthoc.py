"""Post-hoc Tucker: decompose a trained dense network, then fine-tune it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tdlrt.experiments.methods.method import Method
from tdlrt.experiments.methods.sizes import check_budget, dense_sizes, factorizable, largest_shares
from tdlrt.ranks import RankSpec, RelativeTolerance
from tdlrt.surgery import FactorizationReport, factorize_

if TYPE_CHECKING:
    from tdlrt.experiments.config import RunConfig
    from tdlrt.experiments.training import Training

__all__ = ["Posthoc"]

LARGEST_TOLERANCE = 1 - 1e-6


class Posthoc(Method):
    """Train dense until `dense_until`, truncate every weight by HOSVD, train cores and bases.

    Size: one relative tolerance for all layers, up to rounding, the smallest that fits `budget`.

    Source: Kim et al., arXiv:1511.06530, with a tolerance in place of variational Bayes.
    """

    options = frozenset({"budget", "dense_until"})

    def prepare(self, model: nn.Module, config: RunConfig) -> dict[str, int]:
        """Leave the network dense for now."""
        return dense_sizes(factorizable(model))

    def begin(self, training: Training) -> None:
        """Find out before the training whether the network can be made so small.

        Raises:
            RankError: It is larger than the budget at rank 1.
        """
        smallest = _factorize(training, dict.fromkeys(training.layers, 1), dry_run=True)
        sizes = [row.parameters for row in smallest.factorized]
        dense = sum(training.layers.values())
        check_budget(sum(sizes), training.config.budget or 1.0, dense)

    def after_step(self, training: Training) -> None:
        """Decompose the network when its time has come."""
        if training.step != training.dense_steps:
            return

        def size(name: str, share: float) -> int:
            (row,) = _factorize(training, {name: _tolerance(share)}, dry_run=True).factorized
            return row.parameters

        shares = largest_shares(size, training.config.budget or 1.0, training.layers)
        _factorize(training, {name: _tolerance(share) for name, share in shares.items()})
        training.rebuild()

    def restore(self, training: Training, weights: Mapping[str, Tensor]) -> None:
        """Decompose the network if it was when it had these weights; they bring their ranks."""
        if any(f"{name}.core" in weights for name in training.layers):
            _factorize(training, dict.fromkeys(training.layers, 1))
            training.rebuild()


def _tolerance(share: float) -> RelativeTolerance:
    return RelativeTolerance(min(1 - share, LARGEST_TOLERANCE))


def _factorize(
    training: Training, ranks: Mapping[str, RankSpec], *, dry_run: bool = False
) -> FactorizationReport:
    return factorize_(training.model, rank=ranks, init_scale=None, dry_run=dry_run)
