"""The two integrators as pure functions on stacks: points, gradients and state in, new ones out.

They check nothing and read nothing on the host. Every function works on all members of a stack at
once; one layer is a stack of one.
"""

from tdlrt.optim.steps.bug import basis_step, core_step, retract_lifted
from tdlrt.optim.steps.parallel import augmented_step, fixed_rank_step, retract
from tdlrt.optim.steps.points import Augmented, Iterate, Lifted
from tdlrt.optim.steps.shared import brought_along

__all__ = [
    "Augmented",
    "Iterate",
    "Lifted",
    "augmented_step",
    "basis_step",
    "brought_along",
    "core_step",
    "fixed_rank_step",
    "retract",
    "retract_lifted",
]
