"""What the processes of the tests of sharded training do."""

import torch
from torch import nn

import tdlrt
from integrations.replicas import POLICIES
from optim.problems import OPTIMIZERS, tucker_layers
from reference.cases import gaussian
from tdlrt.integrations import fsdp, fsdp_checkpoints

INPUTS, LABELS = gaussian((24, 3, 6), 1), torch.arange(24) % 4  # for 1, 2 and 3 processes


def network():
    """Two layers in Tucker format, and dense ones whose sizes no number of processes divides."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1),
        nn.GroupNorm(1, 8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 12),
        nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 4)),
    ).double()
    tdlrt.factorize_(model, rank={"0": (6, 3, 3), "4": 10}, init_scale=0.3)
    return model


class Training:
    """On one of some processes that share out each batch, or on this one alone (None)."""

    def __init__(self, process=None, count=1, *, name="adamw", policy="tolerance", **options):
        self.model = network()
        if process is not None:
            fsdp.fully_shard_(self.model, [self.model[5]], check_every=3)
        self.rows = slice(None) if process is None else slice(process, None, count)
        optimizer_cls, defaults = OPTIMIZERS[name]
        self.optimizer = tdlrt.TDLRT(
            self.model,
            optimizer_cls,
            rank_policy=POLICIES[policy](),
            adapt_every=1,
            **(defaults | options),
        )
        self.ranks = []

    def closure(self):
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(INPUTS[self.rows]), LABELS[self.rows])
        loss.backward()
        self.optimizer.clip_grad_norm_(0.5)
        return loss

    def steps(self, count):
        for step in range(count):
            if step % 2:
                self.optimizer.step(self.closure)
            else:
                for _ in range(2 if self.optimizer.integrator == "bug" else 1):
                    self.closure()
                    self.optimizer.step()
            self.ranks.append([layer.ranks for layer in tucker_layers(self.model)])
        return self

    @property
    def found(self):
        return full(tdlrt_dense(self.model)), self.ranks


def tdlrt_dense(model):
    """Values that do not depend on the bases: weights of Tucker layers in full."""
    state = model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, tdlrt.nn.TuckerLayer):
            for part in ("core", *(f"factors.{mode}" for mode in layer.learned_modes)):
                del state[f"{name}.{part}"]
            state[f"{name}.weight"] = layer.dense_weight().detach()
    return state


def full(state):
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for name, value in state.items()
    }


def train(process, count, steps, options):
    return Training(process, count, **options).steps(steps).found


def save(process, count, steps, folder, options):
    """Steps, a checkpoint, and further steps."""
    training = Training(process, count, **options).steps(steps)
    fsdp_checkpoints.save(training.model, training.optimizer, folder)
    return training.steps(steps).found


def resume(process, count, steps, folder, options):
    training = Training(process, count, **options)
    fsdp_checkpoints.load(training.model, training.optimizer, folder)
    return training.steps(steps).found
