"""Replacing the layers of a model: dense layers by Tucker layers, and these by torch layers."""

from tdlrt.surgery.conversion import copied, to_dense, to_plain, without_adapters
from tdlrt.surgery.factorization_report import FactorizationReport, FactorizationRow
from tdlrt.surgery.factorize import DEFAULT_INIT_SCALE, factorize_
from tdlrt.surgery.hooks import take_over_hooks
from tdlrt.surgery.layer_types import build_layer, dense_shape, has_own_layout, register_layer
from tdlrt.surgery.reshaping import flattened_modes
from tdlrt.surgery.selection import Patterns, obstacle, pattern_list, plan_surgery, tied_weights
from tdlrt.surgery.swap import replace_modules

__all__ = [
    "DEFAULT_INIT_SCALE",
    "FactorizationReport",
    "FactorizationRow",
    "Patterns",
    "build_layer",
    "copied",
    "dense_shape",
    "factorize_",
    "flattened_modes",
    "has_own_layout",
    "obstacle",
    "pattern_list",
    "plan_surgery",
    "register_layer",
    "replace_modules",
    "take_over_hooks",
    "tied_weights",
    "to_dense",
    "to_plain",
    "without_adapters",
]
