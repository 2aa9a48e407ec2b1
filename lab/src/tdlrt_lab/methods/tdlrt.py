"""TDLRT: training in Tucker format throughout, with adaptive ranks."""

from typing import Any

import torch
from torch import Tensor, nn

from tdlrt.optim import TDLRT
from tdlrt.ranks import (
    DEFAULT_TAU,
    BudgetRecipe,
    CubicSchedule,
    FixedRank,
    LinearSchedule,
    RankPolicy,
    RelativeTolerance,
)
from tdlrt.regularization import spectral_penalty
from tdlrt.surgery import factorize_
from tdlrt_lab.methods.method import OPTIMIZERS, Method, learning_rates, optimizer_options
from tdlrt_lab.methods.training_view import TrainingView
from tdlrt_lab.options import RunOptions
from tdlrt_lab.reshape_option import parse_reshape

__all__ = ["DEFAULT_TAU", "INTEGRATORS", "RAMPS", "TDLRTMethod"]

RAMPS: dict[str, type[LinearSchedule | CubicSchedule] | None] = {
    "constant": None,
    "linear": LinearSchedule,
    "cubic": CubicSchedule,
}

INTEGRATORS = {"parallel": frozenset({"basis_every"}), "bug": frozenset({"core_steps"})}
"""The options of `RunOptions` that only one integrator uses."""

RATES = learning_rates(sgd=0.05, adam=0.006)


class TDLRTMethod(Method):
    """Train cores and bases with `tdlrt.TDLRT` and either integrator.

    Size: given by the tolerance `tau`, or at most `budget`. Cores and bases count.

    Source: arXiv:2305.19059.
    """

    learning_rates = RATES
    options = frozenset(
        {"tau", "budget", "budget_start", "ramp", "spare", "rank", "modes", "reshape"}
        | {"init_scale", "integrator", "adapt_every", "core_steps", "basis_every", "freeze_at"}
        | {"spectral_penalty"}
    )
    needs_budget = False

    def prepare(self, model: nn.Module, config: RunOptions) -> dict[str, int]:
        """Factorise the network."""
        rank: Any = config.rank  # checked by RunConfig, down to the spelling of "full"
        report = factorize_(
            model,
            rank=rank,
            modes=config.modes,
            reshape=None if config.reshape is None else parse_reshape(config.reshape),
            init_scale=config.init_scale,
        )
        return {row.name: row.dense_parameters for row in report.factorized}

    def optimizer(self, model: nn.Module, config: RunOptions, steps: int) -> torch.optim.Optimizer:
        """`tdlrt.TDLRT` around the chosen optimiser."""
        freeze_after = max(1, round(config.freeze_at * steps)) if config.freeze_at > 0 else 0
        return TDLRT(
            model,
            OPTIMIZERS[config.optimizer],
            rank_policy=_rank_policy(config, steps, freeze_after),
            integrator=config.integrator,
            adapt_every=config.adapt_every,
            freeze_after=freeze_after or None,
            **{name: getattr(config, name) for name in INTEGRATORS[config.integrator]},
            **optimizer_options(config),
        )

    def penalty(self, training: TrainingView) -> Tensor | None:
        """The spectral penalty of the cores, once the ranks are frozen."""
        weight, optimizer = training.config.spectral_penalty, training.optimizer
        if weight == 0 or not (isinstance(optimizer, TDLRT) and optimizer.ranks_frozen):
            return None
        return weight * spectral_penalty(training.model)


def _rank_policy(config: RunOptions, steps: int, freeze_after: int) -> RankPolicy:
    if freeze_after == 0:
        return FixedRank()
    ramp = RAMPS[config.ramp]
    if config.budget is not None:
        return BudgetRecipe(
            config.budget,
            steps,
            start=config.budget_start,
            freeze_at=config.freeze_at,
            spare=config.spare,
            ramp=ramp,
        ).rank_policy
    end = DEFAULT_TAU if config.tau is None else config.tau
    length = max(1, round(BudgetRecipe.ramp_share * freeze_after))
    return RelativeTolerance(ramp(0.0, end, length) if ramp else end, spare=config.spare)
