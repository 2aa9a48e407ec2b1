"""Reading leaves a model and torch's random state as they are, bit for bit."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import tdlrt


def around(layer):
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), layer, nn.Linear(12, 8), nn.Linear(8, 3))


class Careless(nn.Module):
    """A forward method that changes whatever it can reach."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.register_buffer("calls", torch.zeros(()))
        self.table, self.seen, self.cache, self.plain = None, [], {}, torch.ones(2)

    def forward(self, x):
        if self.table is None:
            self.table = x.new_ones(12)
            self.register_buffer("built", x.new_ones(1))
        self.seen.append(x)
        self.cache["x"] = x
        self.plain += 1
        self.calls += 1
        self.inner.weight.data = self.inner.weight.data.renorm(2, 0, 0.1)
        self.inner.bias.data.clamp_(-1e-3, 1e-3)
        self.inner.bias.requires_grad_(False)
        return self.inner(x) + torch.rand(12) + self.table


class MergesOnEval(nn.Linear):
    """A linear layer that merges an update into its weight when it is put in evaluation mode."""

    def train(self, mode=True):
        if self.training and not mode:
            self.weight.data += 1
        return super().train(mode)


def old_norm(norm):
    with pytest.warns(FutureWarning) if norm is weight_norm else pytest.MonkeyPatch.context():
        return norm(nn.Linear(12, 12))


MODELS = {
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(12, 12)),
    "spectral norm of a convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 4)),
        parametrizations.spectral_norm(nn.Conv1d(3, 6, 3, padding=1)),
        parametrizations.spectral_norm(nn.ConvTranspose1d(6, 3, 3, padding=1)),
        nn.Flatten(),
    ),
    "old spectral norm": lambda: old_norm(spectral_norm),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(12, 12)),
    "old weight norm": lambda: old_norm(weight_norm),
    "batch norm": lambda: nn.BatchNorm1d(12),
    "dropout": lambda: nn.Dropout(0.5),
    "careless": Careless,
    "merges": lambda: MergesOnEval(12, 12),
}
X = torch.ones(2, 8)
READERS = {
    "summary": tdlrt.summary,
    "summary of a size": lambda model: tdlrt.summary(model, (2, 8)),
    "summary of inputs": lambda model: tdlrt.summary(model, example_inputs=X),
    "metrics": tdlrt.metrics,
    "dry run": lambda model: tdlrt.factorize_(model, rank=0.3, include="*", dry_run=True),
    "to_plain": lambda model: tdlrt.to_plain(model, input_size=(2, 8), fuse_batch_norm=True),
    "to_dense": tdlrt.to_dense,
    "covariances": lambda model: tdlrt.input_covariances(model, [X]),
}


def state(model):
    """Everything that a reader could change, as values that can be compared."""
    found = [torch.get_rng_state()]
    for module in model.modules():
        for key, value in vars(module).items():
            found += [key, value.clone() if torch.is_tensor(value) else copy.copy(value)]
            for place, one in value.items() if isinstance(value, dict) else ():
                found += [place, one]
                if torch.is_tensor(one):
                    grad = None if one.grad is None else one.grad.clone()
                    found += [one.detach().clone(), one.data_ptr(), one.requires_grad, grad]
    return found


def same(one, other):
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict | list):
        return len(one) == len(other)
    return one is other or one == other


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("factorized", [False, True])
def test_reading_changes_nothing(kind, reader, factorized):
    torch.manual_seed(0)
    model = around(MODELS[kind]())
    model[0].requires_grad_(False)
    model[3].eval()
    model[3].register_forward_hook(lambda *_: None)
    if factorized:
        tdlrt.factorize_(model, rank=0.5, include="0")
    if kind != "careless":
        model(torch.randn(4, 8)).sum().backward()
    before, random = state(model), torch.rand(1, generator=torch.default_generator.clone_state())
    READERS[reader](model)
    after = state(model)
    assert len(before) == len(after)
    assert all(map(same, before, after))
    assert torch.equal(torch.rand(1), random)
