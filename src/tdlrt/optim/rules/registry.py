"""The registry of optimiser classes and their rules, which users can extend."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tdlrt.errors import UnsupportedOptimizerError
from tdlrt.optim.rules.adam import AdamRule, AdamWRule
from tdlrt.optim.rules.adapted import adapted_rule
from tdlrt.optim.rules.entrywise import check_class
from tdlrt.optim.rules.rule import Rule
from tdlrt.optim.rules.sgd import SGDRule

__all__ = ["register_rule", "registered_optimizers", "resolve_rule"]


def _momentum_product(taken: Tensor, options: Mapping[str, Any]) -> Tensor:
    """prod_{s=1}^t b1 (1 - 0.96^(s p) / 2) with p = momentum_decay, `mu_product` of NAdam.

    By the logarithm of each factor, with q = 0.96^p:
    sum_s ln(1 - q^s / 2) = -sum_k (q^k / (k 2^k)) (1 - q^(k t)) / (1 - q^k).
    """
    log_q = math.log(0.96) * float(options["momentum_decay"])
    total = taken.double() * math.log(float(options["betas"][0]) or math.ulp(0.0))
    for k in range(1, 60):  # 2^-60 is below the rounding of float64
        terms = taken if log_q == 0 else torch.expm1(k * log_q * taken) / math.expm1(k * log_q)
        total = total - math.exp(k * log_q) / (k * 2**k) * terms
    return total.exp()


_RULES: dict[type[torch.optim.Optimizer], type[Rule]] = {
    torch.optim.SGD: SGDRule,
    torch.optim.Adam: AdamRule,
    torch.optim.AdamW: AdamWRule,
    torch.optim.NAdam: adapted_rule(
        torch.optim.NAdam,
        linear=["exp_avg"],
        squares=["exp_avg_sq"],
        counters={"mu_product": _momentum_product},
    ),
    torch.optim.RAdam: adapted_rule(torch.optim.RAdam, linear=["exp_avg"], squares=["exp_avg_sq"]),
    torch.optim.Adamax: adapted_rule(torch.optim.Adamax, linear=["exp_avg"], sizes=["exp_inf"]),
    torch.optim.RMSprop: adapted_rule(
        torch.optim.RMSprop,
        linear=["grad_avg", "momentum_buffer"],
        squares=["square_avg"],
        centers={"square_avg": "grad_avg"},
    ),
    torch.optim.Adagrad: adapted_rule(torch.optim.Adagrad, squares=["sum"]),
    torch.optim.Adadelta: adapted_rule(torch.optim.Adadelta, squares=["square_avg", "acc_delta"]),
    torch.optim.Rprop: adapted_rule(torch.optim.Rprop, linear=["prev"], sizes=["step_size"]),
}


def register_rule(optimizer_cls: type[torch.optim.Optimizer], rule: type[Rule]) -> None:
    """Let `TDLRT` train Tucker weights with an optimiser, by a rule.

    Subclasses of the optimiser are not included and have to be registered separately. A second call
    for the same class replaces the first.

    Args:
        optimizer_cls: The optimiser's class. It moves the parameters that are not in Tucker format.
        rule: A class derived from `Rule`, or what `adapted_rule` returns.

    Raises:
        UnsupportedOptimizerError: optimizer_cls is no class of torch optimisers, or rule is no
            class of rules, or leaves `advance` or `first_moments` out.
    """
    check_class(optimizer_cls)
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise UnsupportedOptimizerError(
            f"rule: got {rule!r}, expected a class derived from tdlrt.optim.Rule, such as "
            "adapted_rule(...) returns"
        )
    missing = ["advance"] if inspect.isabstract(rule) else []
    missing += [] if hasattr(rule, "first_moments") else ["first_moments"]
    if missing:
        raise UnsupportedOptimizerError(
            f"rule: got {rule.__name__} without {' and '.join(missing)}, expected a rule that has "
            "both; see tdlrt.optim.Rule"
        )
    _RULES[optimizer_cls] = rule


def registered_optimizers() -> tuple[type[torch.optim.Optimizer], ...]:
    """The optimiser classes that have a rule."""
    return tuple(_RULES)


def resolve_rule(optimizer_cls: type[torch.optim.Optimizer]) -> type[Rule]:
    """The rule of a torch optimiser.

    Raises:
        UnsupportedOptimizerError: It is no class of torch optimisers, or has no rule.
    """
    check_class(optimizer_cls)
    if optimizer_cls not in _RULES:
        known = ", ".join(f"torch.optim.{cls.__name__}" for cls in _RULES)
        raise UnsupportedOptimizerError(
            f"optimizer_cls: got {optimizer_cls.__name__}, which has no rule for Tucker weights; "
            f"use {known}"
        )
    return _RULES[optimizer_cls]
