"""Pure functions on tensors of any order: the mathematics of Tucker weights and their steps.

A Tucker weight is W = C x_1 U_1 ... x_d U_d, with a *core* C and for each mode i a *basis* U_i, a
matrix with orthonormal columns. A *direction* of mode i is a unit vector in the range of U_i, such
as one of its columns; the rank r_i is their number. A *stack* holds the tensors of several weights,
its *members*, along one leading dimension, and zeros, the *padding*, where their sizes differ.
"""

from tdlrt.linalg.algebra import (
    TuckerTensor,
    add_product,
    check_ranks,
    fold,
    mode_product,
    multi_mode_product,
    rank_is_excessive,
    unfold,
)
from tdlrt.linalg.bases import (
    damped_qr,
    new_directions,
    orthonormality_error,
    orthonormality_tolerance,
    orthonormalize,
    polish_basis,
    positive_qr,
    reject,
)
from tdlrt.linalg.stacks import Layout, cleared
from tdlrt.linalg.tangent import (
    Factorization,
    TangentSpace,
    TangentVector,
    factorize_core,
    pad_core,
)
from tdlrt.linalg.transport import Cut, Transport, stochastic
from tdlrt.linalg.truncation import (
    Cutoff,
    Truncation,
    kept_ranks,
    possible_ranks,
    relative_spectrum,
    squared_singular_values,
    truncate,
    truncate_stack,
)
from tdlrt.linalg.weighting import shrunk_root, truncate_weighted

__all__ = [
    "Cut",
    "Cutoff",
    "Factorization",
    "Layout",
    "TangentSpace",
    "TangentVector",
    "Transport",
    "Truncation",
    "TuckerTensor",
    "add_product",
    "check_ranks",
    "cleared",
    "damped_qr",
    "factorize_core",
    "fold",
    "kept_ranks",
    "mode_product",
    "multi_mode_product",
    "new_directions",
    "orthonormality_error",
    "orthonormality_tolerance",
    "orthonormalize",
    "pad_core",
    "polish_basis",
    "positive_qr",
    "possible_ranks",
    "rank_is_excessive",
    "reject",
    "relative_spectrum",
    "shrunk_root",
    "squared_singular_values",
    "stochastic",
    "truncate",
    "truncate_stack",
    "truncate_weighted",
    "unfold",
]
