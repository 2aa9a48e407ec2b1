"""A small problem on which ranks change, for every training stack."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tdlrt

STEPS_PER_EPOCH, EPOCHS = 4, 6
STEPS = STEPS_PER_EPOCH * EPOCHS


def network():
    """The linear layer in the middle starts at rank 8 and loses ranks in most epochs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 3)
    )
    tdlrt.factorize_(model, rank=0.5, init_scale=0.3)
    return model


def loader(batch_size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * STEPS_PER_EPOCH, 1, 4, 4, generator=generator)
    y = torch.randint(0, 3, (len(x),), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def optimizer(model, **options):
    return tdlrt.TDLRT(
        model, torch.optim.SGD, **{"lr": 0.2, "momentum": 0.9, "tau": 0.4, **options}
    )


def scheduler(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))


def plain_loop(*, closure=True, max_grad_norm=None, accumulate=1, **options):
    """The loop that the stacks should equal: the model, and the loss of every micro-batch."""
    model, losses = network(), []
    moved = optimizer(model, **options)
    schedule = scheduler(moved)
    for _ in range(EPOCHS):
        for number, (x, y) in enumerate(loader()):

            def evaluate(x=x, y=y, number=number):
                if number % accumulate == 0:
                    moved.zero_grad()
                loss = F.cross_entropy(model(x), y) / accumulate
                loss.backward()
                losses.append(accumulate * loss.item())
                if max_grad_norm is not None:
                    moved.clip_grad_norm_(max_grad_norm)
                return loss

            if (number + 1) % accumulate:
                evaluate()
                continue
            if closure:
                moved.step(evaluate)
            else:
                evaluate()
                moved.step()
            schedule.step()
    return model, losses


def linear_rank(model):
    return tdlrt.summary(model).rows[-2].ranks[0]


def assert_same_weights(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    assert [*mine] == [*theirs]
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
