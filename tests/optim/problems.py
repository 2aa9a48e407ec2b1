"""Small training problems: one layer with a known dense gradient, and a little network."""

import pytest
import torch
from torch import Tensor, nn

import tdlrt
from reference.cases import gaussian
from tdlrt import nn as tnn

SPLIT = ((4, 5), (3, 2, 3))
LAYERS = {
    "linear": (lambda **k: tnn.TuckerLinear(9, 7, **k), (6, 9)),
    "tensor": (lambda **k: tnn.TuckerLinear(12, 10, reshape=((10,), (3, 2, 2)), **k), (6, 12)),
    "split rows": (lambda **k: tnn.TuckerLinear(18, 20, reshape=SPLIT, **k), (6, 18)),
    "conv1d": (lambda **k: tnn.TuckerConv1d(5, 6, 3, stride=2, padding=1, **k), (3, 5, 11)),
    "conv2d": (
        lambda **k: tnn.TuckerConv2d(5, 6, (3, 2), stride=(2, 1), dilation=(1, 2), **k),
        (3, 5, 9, 8),
    ),
    "conv3d": (
        lambda **k: tnn.TuckerConv3d(3, 4, (2, 3, 1), padding=(1, 0, 1), **k),
        (2, 3, 4, 5, 4),
    ),
}


class Regression:
    """Fit the output of one layer to a target; knows the gradient with respect to the weight."""

    def __init__(self, kind: str, *, rank: object = 0.5, modes: str = "all", seed: int = 0) -> None:
        make, shape = LAYERS[kind]
        torch.manual_seed(seed)
        self.layer = make(rank=rank, modes=modes, dtype=torch.float64)
        self.model = nn.Sequential(self.layer)
        self.inputs = gaussian(shape, seed + 1)
        self.target = gaussian(self.model(self.inputs).shape, seed + 2)
        self.plain = self.layer.to_dense()

    def loss(self, outputs: Tensor) -> Tensor:
        return (outputs - self.target).square().sum() / len(self.inputs)

    def closure(self) -> Tensor:
        self.model.zero_grad()
        loss = self.loss(self.model(self.inputs))
        loss.backward()
        return loss

    def dense_gradient(self, weight: Tensor) -> Tensor:
        """grad_W L with the bias where the layer has it now, from torch's own layer."""
        weight = weight.clone().requires_grad_()
        matrix = weight.reshape(self.plain.weight.shape)
        arguments = {"weight": matrix, "bias": self.layer.bias.detach()}
        loss = self.loss(torch.func.functional_call(self.plain, arguments, (self.inputs,)))
        return torch.autograd.grad(loss, weight)[0]


INTEGRATORS = pytest.mark.parametrize("integrator", ["parallel", "bug"])

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.2}),
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
    "nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "maximize": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "maximize": True}),
    "adam": (torch.optim.Adam, {"lr": 1e-2}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "amsgrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    "maximize adamw": (torch.optim.AdamW, {"lr": 1e-2, "maximize": True}),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("optimizer_name", OPTIMIZERS)


class Small:
    """A network of three layers, two of them in Tucker format, and an optimiser by name."""

    def __init__(self, name="momentum", *, seed=0, dtype=torch.float32, rank=0.8, **options):
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Conv1d(3, 8, 3, padding=1, dtype=dtype),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48, 12, dtype=dtype),
            nn.ReLU(),
            nn.Linear(12, 4, dtype=dtype),
        )
        tdlrt.factorize_(self.model, rank=rank)
        optimizer_cls, defaults = OPTIMIZERS[name]
        self.optimizer = tdlrt.TDLRT(self.model, optimizer_cls, **(defaults | options))
        self.sign = -1 if "maximize" in name else 1
        self.inputs = gaussian((8, 3, 6), 1, dtype)
        self.labels = torch.arange(8) % 4

    @property
    def layers(self):
        return tucker_layers(self.model)

    @property
    def ranks(self):
        return [layer.ranks for layer in self.layers]

    def loss(self, rows=slice(None)):
        """Over some of the inputs; to be maximised if the optimiser does that."""
        outputs = self.model(self.inputs[rows])
        return self.sign * nn.functional.cross_entropy(outputs, self.labels[rows])

    def backward(self):
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def call(self, times=1):
        """Backward and step without a closure; `bug` takes two of them for a whole step."""
        for _ in range(times):
            self.backward()
            self.optimizer.step()

    def step(self, times=1):
        """Whole steps, on a closure."""
        for _ in range(times):
            self.optimizer.step(self.backward)


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, dtype=dtype),
        nn.BatchNorm2d(12, dtype=dtype),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, dtype=dtype),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 20, dtype=dtype),
        nn.ReLU(),
        nn.Linear(20, 5, dtype=dtype),
    )
    tdlrt.factorize_(model, rank=0.5)
    return model


def batch(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 3, 8, 8, generator=generator, dtype=dtype)
    return images, torch.randint(0, 5, (16,), generator=generator)


def closure_for(model, images, labels):
    def closure():
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    return closure


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.step(closure_for(model, *batch(step % 7)))


def optimizer_for(model, **options):
    options = {"lr": 0.05, "momentum": 0.9, "tau": 0.1} | options
    return tdlrt.TDLRT(model, torch.optim.SGD, **options)


def tucker_layers(model):
    return [module for module in model.modules() if isinstance(module, tdlrt.nn.TuckerLayer)]


def assert_same(expected, actual):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(expected, actual) or (expected != expected).any()
        assert expected.shape == actual.shape
    elif isinstance(expected, dict):
        assert expected.keys() == actual.keys()
        for key in expected:
            assert_same(expected[key], actual[key])
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(actual)
        for one, other in zip(expected, actual, strict=True):
            assert_same(one, other)
    else:
        assert expected == actual
