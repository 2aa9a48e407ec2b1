"""Replacing the layers of a model: dense layers by Tucker layers, and these by torch layers."""

from tdlrt.nn.layer_types import register_layer
from tdlrt.surgery.attention import packed_attention, split_attention
from tdlrt.surgery.conversion import copied, plain_layers, to_dense, to_plain, without_adapters
from tdlrt.surgery.factorization_report import FactorizationReport, FactorizationRow
from tdlrt.surgery.factorize import factorize_
from tdlrt.surgery.hooks import take_over_hooks
from tdlrt.surgery.reshaping import flattened_modes, reshaped_layers
from tdlrt.surgery.selection import Patterns, obstacle, pattern_list, plan_surgery
from tdlrt.surgery.swap import replace_modules
from tdlrt.surgery.tied import tied_weights

__all__ = [
    "FactorizationReport",
    "FactorizationRow",
    "Patterns",
    "copied",
    "factorize_",
    "flattened_modes",
    "obstacle",
    "packed_attention",
    "pattern_list",
    "plain_layers",
    "plan_surgery",
    "register_layer",
    "replace_modules",
    "reshaped_layers",
    "split_attention",
    "take_over_hooks",
    "tied_weights",
    "to_dense",
    "to_plain",
    "without_adapters",
]
