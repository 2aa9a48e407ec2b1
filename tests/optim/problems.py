"""Small training problems with a known dense gradient."""

import torch
from torch import Tensor, nn

from reference.cases import gaussian
from tdlrt import nn as tnn

LAYERS = {
    "linear": (lambda **k: tnn.TuckerLinear(9, 7, **k), (6, 9)),
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
        arguments = {"weight": weight, "bias": self.layer.bias.detach()}
        loss = self.loss(torch.func.functional_call(self.plain, arguments, (self.inputs,)))
        return torch.autograd.grad(loss, weight)[0]


def dense_momentum(optimizer: torch.optim.Optimizer, layer: tnn.TuckerLayer) -> Tensor | None:
    """The momentum of a layer as a tensor of the size of its weight."""
    (slot,) = [slot for slot in optimizer._slots.values() if slot.layer is layer]
    iterate = slot.iterate(optimizer.state, optimizer._rule(slot.name))
    momentum = iterate.moments.get("momentum_buffer")
    return None if momentum is None else iterate.space.to_tensor(momentum)
