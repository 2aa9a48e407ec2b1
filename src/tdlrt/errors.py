"""Exceptions. A message names the argument, the value given, the value expected and a remedy."""

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "IntegratorStateError",
    "MissingExtraError",
    "NonFiniteError",
    "NothingMatchedError",
    "PathError",
    "RankError",
    "RunError",
    "SetupError",
    "StateDictError",
    "TdlrtError",
    "UnknownNameError",
    "UnsupportedLayerError",
    "UnsupportedOptimizerError",
]


class TdlrtError(Exception):
    """Base class of every error this library raises on purpose."""


class UnsupportedLayerError(TdlrtError, TypeError):
    """A layer has no Tucker format, such as a grouped convolution, or cannot be used as asked."""


class UnsupportedOptimizerError(TdlrtError, TypeError):
    """An optimiser class or one of its options has no rule for Tucker weights."""


class RankError(TdlrtError, ValueError):
    """A rank, a tolerance or a rank policy is outside its range."""


class NothingMatchedError(TdlrtError, ValueError):
    """No layer of the model can be factorised, or a pattern matches no layer."""


class AdapterError(TdlrtError, RuntimeError):
    """A model already has adapters or has none, or adapters do not fit the model or the file."""


class CheckpointError(TdlrtError, ValueError):
    """A model's file cannot be written or read, or does not fit; the model is not changed."""


class PathError(TdlrtError, ValueError):
    """A forward path is unknown or does not fit the layer."""


class IntegratorStateError(TdlrtError, RuntimeError):
    """The optimiser's state does not fit the model, or a method is called at the wrong time."""


class StateDictError(TdlrtError, RuntimeError):
    """A state_dict does not fit a Tucker layer because it comes from another architecture."""


class NonFiniteError(TdlrtError, ArithmeticError):
    """A gradient or a weight is NaN or infinite; nothing was changed."""


class SetupError(TdlrtError, ValueError):
    """A training library is set up in a way that gives wrong results with Tucker layers."""


class MissingExtraError(TdlrtError, ImportError):
    """An optional package is not installed."""


class ExportError(TdlrtError, ValueError):
    """A network cannot be written as asked, or an exported file cannot be read."""


class UnknownNameError(TdlrtError, ValueError):
    """A model, data set or method name is not known."""


class ConfigError(TdlrtError, ValueError):
    """An option of a run is outside its range, or two options contradict each other."""


class DataError(TdlrtError, ValueError):
    """A data file is missing, broken or not in the expected layout."""


class RunError(TdlrtError, RuntimeError):
    """A run directory cannot be written, read or resumed."""
