"""Pure functions on tensors of any order: the mathematics that everything above is made of."""

from tdlrt.linalg.algebra import (
    TuckerTensor,
    check_ranks,
    fold,
    mode_product,
    multi_mode_product,
    rank_is_excessive,
    unfold,
)
from tdlrt.linalg.bases import (
    new_directions,
    orthonormality_error,
    orthonormality_tolerance,
    orthonormalize,
    polish_basis,
    positive_qr,
    reject,
)
from tdlrt.linalg.tangent import TangentSpace, TangentVector, well_conditioned
from tdlrt.linalg.transport import Cut, Transport, stochastic
from tdlrt.linalg.truncation import RankRule, smallest_rank, squared_singular_values, truncate
from tdlrt.linalg.weighting import shrunk_root, truncate_weighted

__all__ = [
    "Cut",
    "RankRule",
    "TangentSpace",
    "TangentVector",
    "Transport",
    "TuckerTensor",
    "check_ranks",
    "fold",
    "mode_product",
    "multi_mode_product",
    "new_directions",
    "orthonormality_error",
    "orthonormality_tolerance",
    "orthonormalize",
    "polish_basis",
    "positive_qr",
    "rank_is_excessive",
    "reject",
    "shrunk_root",
    "smallest_rank",
    "squared_singular_values",
    "stochastic",
    "truncate",
    "truncate_weighted",
    "unfold",
    "well_conditioned",
]
