"""A plain training loop to a budget, and the plain network at its end."""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

import tdlrt
from digits import load_digits

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=12)
epochs = parser.parse_args().epochs

torch.manual_seed(0)
images, labels, test_images, test_labels = load_digits()
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(32, 64, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(1024, 128),
    nn.ReLU(),
    nn.Linear(128, 10),
)
tdlrt.factorize_(model, rank=0.5)
print("before", tdlrt.summary(model), sep="\n")

steps = epochs * (len(images) // 32)
optimizer = tdlrt.TDLRT(
    model,
    torch.optim.Adam,
    lr=2e-3,
    rank_policy=tdlrt.ParameterBudget(0.1),  # a tenth of the dense parameters
    freeze_after=steps // 2,
)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
for _ in range(epochs):
    for batch in torch.randperm(len(images)).split(32)[:-1]:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        scheduler.step()

plain = tdlrt.to_plain(model).eval()  # nn.Conv2d and nn.Linear only
with torch.no_grad():
    accuracy = (plain(test_images).argmax(1) == test_labels).float().mean().item()
print("after", tdlrt.summary(model), sep="\n")
print(f"test accuracy {accuracy:.1%}")
