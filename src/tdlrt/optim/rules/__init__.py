"""Rules: the meaning of torch's optimisers for a Tucker weight, one file for each."""

from __future__ import annotations

import torch

from tdlrt.errors import UnsupportedOptimizerError
from tdlrt.optim.rules.adam import AdamRule, AdamWRule
from tdlrt.optim.rules.rule import Moments, Rule
from tdlrt.optim.rules.sgd import SGDRule

__all__ = ["Moments", "Rule", "resolve_rule"]

_RULES: dict[type[torch.optim.Optimizer], type[Rule]] = {
    torch.optim.SGD: SGDRule,
    torch.optim.Adam: AdamRule,
    torch.optim.AdamW: AdamWRule,
}


def resolve_rule(optimizer_cls: type[torch.optim.Optimizer]) -> type[Rule]:
    """The rule of a torch optimiser.

    Raises:
        UnsupportedOptimizerError: The optimiser has no rule.
    """
    if optimizer_cls not in _RULES:
        known = ", ".join(f"torch.optim.{cls.__name__}" for cls in _RULES)
        got = getattr(optimizer_cls, "__name__", repr(optimizer_cls))
        raise UnsupportedOptimizerError(
            f"optimizer_cls: got {got}, which has no rule for Tucker weights; use {known}"
        )
    return _RULES[optimizer_cls]
