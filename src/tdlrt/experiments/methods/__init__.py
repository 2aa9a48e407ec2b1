"""The ways to train a network that a run can choose from, each a small file behind one interface.

A new method is a class in a file of its own and a line in `METHODS`.
"""

from tdlrt.experiments.methods.cp import CP
from tdlrt.experiments.methods.dense import Dense
from tdlrt.experiments.methods.grasp import GraSP
from tdlrt.experiments.methods.magnitude import Magnitude
from tdlrt.experiments.methods.matrix import Matrix
from tdlrt.experiments.methods.matrix_dlrt import MatrixDLRT
from tdlrt.experiments.methods.method import OPTIMIZERS, Method
from tdlrt.experiments.methods.posthoc import Posthoc
from tdlrt.experiments.methods.snip import SNIP
from tdlrt.experiments.methods.structured import Structured
from tdlrt.experiments.methods.tdlrt import DEFAULT_TAU, RAMPS, TDLRTMethod
from tdlrt.experiments.methods.tensor_train import TensorTrain
from tdlrt.experiments.methods.tucker import Tucker

__all__ = ["DEFAULT_TAU", "METHODS", "OPTIMIZERS", "RAMPS", "Method"]

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
