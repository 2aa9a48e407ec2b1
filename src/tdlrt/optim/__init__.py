"""The integrators, from pure steps to the torch optimiser.

A *rule* is the meaning of a torch optimiser for a Tucker weight. A *slot* is one Tucker layer with
its part of the optimiser's state. A *batch* holds the layers whose steps are computed together, in
stacks (see `tdlrt.linalg`). A *pass* is what an integrator does with the gradients of one backward
pass: `parallel` takes one pass per step, `bug` several. Bases *rest* in a step that moves only the
core, and a layer is *at rest* when it is not between two passes of `bug`. The *plain* parameters
are those that are not in Tucker format.
"""

from tdlrt.optim.graphs import GraphedStep
from tdlrt.optim.optimizer import TDLRT
from tdlrt.optim.rules import Rule, adapted_rule, register_rule, registered_optimizers

__all__ = [
    "TDLRT",
    "GraphedStep",
    "Rule",
    "adapted_rule",
    "register_rule",
    "registered_optimizers",
]
