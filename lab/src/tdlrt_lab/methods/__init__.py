"""The methods by which a run can train and compress a network.

A new method is a class derived from `Method`, in a file of its own, and an entry in `METHODS`.
"""

from tdlrt_lab.methods.cp import CP
from tdlrt_lab.methods.dense import Dense
from tdlrt_lab.methods.grasp import GraSP
from tdlrt_lab.methods.magnitude import Magnitude
from tdlrt_lab.methods.matrix import Matrix
from tdlrt_lab.methods.matrix_dlrt import MatrixDLRT
from tdlrt_lab.methods.method import OPTIMIZER_OPTIONS, OPTIMIZERS, Method
from tdlrt_lab.methods.posthoc import Posthoc
from tdlrt_lab.methods.snip import SNIP
from tdlrt_lab.methods.structured import Structured
from tdlrt_lab.methods.tdlrt import DEFAULT_TAU, INTEGRATORS, RAMPS, TDLRTMethod
from tdlrt_lab.methods.tensor_train import TensorTrain
from tdlrt_lab.methods.tucker import Tucker

__all__ = [
    "DEFAULT_TAU",
    "INTEGRATORS",
    "METHODS",
    "OPTIMIZERS",
    "OPTIMIZER_OPTIONS",
    "RAMPS",
    "Method",
]

METHODS: dict[str, Method] = {
    "tdlrt": TDLRTMethod(),
    "dense": Dense(),
    "tucker": Tucker(),
    "cp": CP(),
    "tensor_train": TensorTrain(),
    "matrix": Matrix(),
    "matrix_dlrt": MatrixDLRT(),
    "posthoc": Posthoc(),
    "magnitude": Magnitude(),
    "snip": SNIP(),
    "grasp": GraSP(),
    "structured": Structured(),
}
