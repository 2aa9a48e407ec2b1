"""Rules: the meaning of torch's optimisers for a Tucker weight, and their registry."""

from tdlrt.optim.rules.adapted import adapted_rule
from tdlrt.optim.rules.registry import register_rule, registered_optimizers, resolve_rule
from tdlrt.optim.rules.rule import Moments, Rule

__all__ = [
    "Moments",
    "Rule",
    "adapted_rule",
    "register_rule",
    "registered_optimizers",
    "resolve_rule",
]
