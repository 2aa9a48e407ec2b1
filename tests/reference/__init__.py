"""Slow float64 twins of the library, from the formulas, with every weight formed in full."""

from reference.algebra import (
    as_double,
    fold,
    kronecker,
    mode_product,
    multi_product,
    tangent_projection,
    tucker_to_dense,
    unfold,
)
from reference.integrators import State, augmented_basis, basis_direction, bug_step, parallel_step
from reference.rules import SGD, Adam, AdamW
from reference.truncation import kept_rank, smallest_rank, truncate

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "State",
    "as_double",
    "augmented_basis",
    "basis_direction",
    "bug_step",
    "fold",
    "kept_rank",
    "kronecker",
    "mode_product",
    "multi_product",
    "parallel_step",
    "smallest_rank",
    "tangent_projection",
    "truncate",
    "tucker_to_dense",
    "unfold",
]
