"""Forward paths of Tucker layers: their stages, their cost, their choice and the passes."""

from tdlrt.paths.choose import Preference, check_preference, choose_path
from tdlrt.paths.cost import Purpose, dense_cost, path_cost
from tdlrt.paths.stages import (
    PATHS,
    LayerShape,
    PathChoice,
    PathName,
    check_path,
    conv_shape,
    linear_shape,
    path_macs,
    path_parameters,
)

__all__ = [
    "PATHS",
    "LayerShape",
    "PathChoice",
    "PathName",
    "Preference",
    "Purpose",
    "check_path",
    "check_preference",
    "choose_path",
    "conv_shape",
    "dense_cost",
    "linear_shape",
    "path_cost",
    "path_macs",
    "path_parameters",
]
