"""The steps of both integrators as pure functions on stacks of weights, gradients and state.

The functions check nothing and read nothing on the host. Each works on all members of a stack at
once; a single layer is a stack of one member.
"""

from tdlrt.optim.steps.bug import basis_step, core_step, retract_lifted
from tdlrt.optim.steps.parallel import augmented_step, fixed_rank_step, retract
from tdlrt.optim.steps.points import Augmented, Iterate, Lifted
from tdlrt.optim.steps.shared import brought_along, core_brought_along

__all__ = [
    "Augmented",
    "Iterate",
    "Lifted",
    "augmented_step",
    "basis_step",
    "brought_along",
    "core_brought_along",
    "core_step",
    "fixed_rank_step",
    "retract",
    "retract_lifted",
]
