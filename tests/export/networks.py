"""Small trained-like networks: what there is to export."""

import torch
from torch import nn

import tdlrt
from tdlrt_lab.models import build_model


def lenet5():
    return factorized(build_model("lenet5", (1, 8, 8), 10)), torch.randn(5, 1, 8, 8)


def rescnn():
    model, inputs = factorized(build_model("rescnn", (3, 8, 8), 10)), torch.randn(5, 3, 8, 8)
    for _ in range(3):  # statistics that are not those of a new batch norm
        model(2 * inputs + 1)
    return model, inputs


def sequence():
    """Conv1d with everything that can be lost on the way, and Linear layers without bias."""
    model = nn.Sequential(
        nn.Conv1d(6, 16, 5, stride=2, padding=3, dilation=2, padding_mode="circular"),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16 * 10, 24, bias=False),
        nn.ReLU(),
        nn.Linear(24, 3),
    )
    return factorized(model), torch.randn(4, 6, 21)


def factorized(model):
    torch.manual_seed(0)
    tdlrt.factorize_(model, rank=0.4, init_scale=1.0)
    return model


def dense(name):
    """The network as it was before `factorize_`, with other weights."""
    torch.manual_seed(99)
    if name == "sequence":
        return tdlrt.to_dense(sequence()[0])
    return build_model(name, (1 if name == "lenet5" else 3, 8, 8), 10)


NETWORKS = {"lenet5": lenet5, "rescnn": rescnn, "sequence": sequence}
