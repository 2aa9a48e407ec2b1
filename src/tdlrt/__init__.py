"""Train PyTorch networks in tensor Tucker format, with every rank found during training."""

from tdlrt import nn
from tdlrt.adapters import (
    add_adapters_,
    load_adapters,
    merge_adapters_,
    save_adapters,
    unload_adapters_,
)
from tdlrt.covariances import input_covariances
from tdlrt.errors import (
    AdapterError,
    CheckpointError,
    IntegratorStateError,
    MissingExtraError,
    NonFiniteError,
    NothingMatchedError,
    PathError,
    RankError,
    SetupError,
    StateDictError,
    TdlrtError,
    UnsupportedLayerError,
    UnsupportedOptimizerError,
)
from tdlrt.optim import TDLRT, GraphedStep
from tdlrt.ranks import (
    CubicSchedule,
    FixedRank,
    LinearSchedule,
    ParameterBudget,
    RelativeTolerance,
)
from tdlrt.regularization import spectral_penalty
from tdlrt.report import metrics, summary
from tdlrt.serialization import load, save
from tdlrt.surgery import factorize_, flattened_modes, to_dense, to_plain
from tdlrt.tuning import autotune_

__all__ = [
    "TDLRT",
    "AdapterError",
    "CheckpointError",
    "CubicSchedule",
    "FixedRank",
    "GraphedStep",
    "IntegratorStateError",
    "LinearSchedule",
    "MissingExtraError",
    "NonFiniteError",
    "NothingMatchedError",
    "ParameterBudget",
    "PathError",
    "RankError",
    "RelativeTolerance",
    "SetupError",
    "StateDictError",
    "TdlrtError",
    "UnsupportedLayerError",
    "UnsupportedOptimizerError",
    "add_adapters_",
    "autotune_",
    "factorize_",
    "flattened_modes",
    "input_covariances",
    "load",
    "load_adapters",
    "merge_adapters_",
    "metrics",
    "nn",
    "save",
    "save_adapters",
    "spectral_penalty",
    "summary",
    "to_dense",
    "to_plain",
    "unload_adapters_",
]

__version__ = "0.1.0"
