"""What the processes of the tests of sharded training do."""

import torch
from torch import nn

import tdlrt
from optim.problems import OPTIMIZERS, tucker_layers
from reference.cases import gaussian
from tdlrt.integrations import fsdp, fsdp_checkpoints

INPUTS, LABELS = gaussian((24, 3, 6), 1), torch.arange(24) % 4  # for 1, 2 and 3 processes


def network():
    """Two layers in Tucker format, and dense ones whose sizes no number of processes divides."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 16, 3, padding=1),
        nn.GroupNorm(1, 16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 48),
        nn.Sequential(nn.Linear(48, 7), nn.Tanh(), nn.Linear(7, 4)),
    ).double()
    tdlrt.factorize_(model, rank={"0": (9, 3, 3), "4": 24}, init_scale=0.3)
    return model


class Training:
    """On one of some processes that share out each batch, or on this one alone (None)."""

    def __init__(self, process=None, count=1, *, name="adamw", dtype=torch.float64, **options):
        self.model, self.inputs = network().to(dtype), INPUTS.to(dtype)
        if process is not None:
            fsdp.fully_shard_(self.model, [self.model[5]], check_every=3)
        self.rows = slice(None) if process is None else slice(process, None, count)
        optimizer_cls, defaults = OPTIMIZERS[name]
        self.optimizer = tdlrt.TDLRT(
            self.model,
            optimizer_cls,
            rank_policy=tdlrt.RelativeTolerance(tdlrt.LinearSchedule(0.0, 0.6, 40)),
            adapt_every=1,
            **(defaults | options),
        )
        self.ranks = []

    def closure(self):
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.inputs[self.rows]), LABELS[self.rows])
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
        return weights(self.model), self.ranks


def weights(model):
    """Weights in full, whatever is sharded and whatever the bases are."""
    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for name, value in model.state_dict().items()
    }
    for name, layer in model.named_modules():
        if isinstance(layer, tdlrt.nn.TuckerLayer):
            for part in ("core", *(f"factors.{mode}" for mode in layer.learned_modes)):
                del state[f"{name}.{part}"]
            state[f"{name}.weight"] = layer.dense_weight().detach()
    return state


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


def clip(process, count):
    """Norm of all gradients, and of the dense ones that are left."""
    training = Training(process, count)
    nn.functional.cross_entropy(
        training.model(INPUTS[training.rows]), LABELS[training.rows]
    ).backward()
    norm = training.optimizer.clip_grad_norm_(0.01)
    left = [p.grad for p in training.model.parameters()]
    return norm, [g.full_tensor() if hasattr(g, "full_tensor") else g for g in left]


def overflow(process, count):
    """A part of a dense gradient that is not finite, on the last process; then a step that is."""
    training = Training(process, count, skip_nonfinite=1)
    optimizer, ranks, texts = training.optimizer, [], []
    for number in range(3):
        training.closure()
        before = weights(training.model)
        gradient = training.model[5][0].weight.grad
        if number and process in (None, count - 1):
            part = gradient.to_local() if process is not None else gradient
            part[-1, -1] = torch.nan
        try:
            optimizer.step()
        except tdlrt.NonFiniteError as error:
            texts.append(str(error))
        after = weights(training.model)
        ranks.append(all(torch.equal(before[name], after[name]) for name in before))
    return ranks, texts, optimizer.skipped_steps


def start(process, count):
    """Other weights and ranks on every process, before."""
    model = network()
    if process:
        tdlrt.nn.TuckerLayer.resize_(
            model[4], model[4].core[:5, :5], [f[:, :5] for f in model[4].factors]
        )
        for parameter in model.parameters():
            parameter.data += 1
    fsdp.fully_shard_(model)
    return weights(model)


def reduced(process, count):
    """Gradients sent in bfloat16, and in full."""
    found = []
    for dtype in (torch.bfloat16, None):
        model = network()
        fsdp.fully_shard_(model, reduce_dtype=dtype)
        rows = slice(process, None, count)
        nn.functional.cross_entropy(model(INPUTS[rows]), LABELS[rows]).backward()
        found.append([p.grad for p in (model[4].core, *model[4].factors)])
    return found
