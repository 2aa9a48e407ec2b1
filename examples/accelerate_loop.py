"""An Accelerate loop; its weights are saved and loaded into a new model."""

import argparse
import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tdlrt
from digits import load_digits

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=8)
epochs = parser.parse_args().epochs


def build_model() -> nn.Module:
    """A small dense network."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


set_seed(0)
images, labels, test_images, test_labels = load_digits()
loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
model = build_model()
tdlrt.factorize_(model, rank=0.5)
print("before", tdlrt.summary(model), sep="\n")

steps = epochs * len(loader)
optimizer = tdlrt.TDLRT(
    model, torch.optim.SGD, lr=0.05, momentum=0.9, tau=0.15, freeze_after=steps // 2
)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
accelerator = Accelerator()
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

for _ in range(epochs):
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
        accelerator.backward(loss)
        # Not accelerator.clip_grad_norm_: the TDLRT inside measures the projected gradient.
        optimizer.optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

# A dense model takes up ranks and weights from the file.
restored = build_model().eval()
with tempfile.TemporaryDirectory() as folder:
    tdlrt.save(accelerator.unwrap_model(model), f"{folder}/digits.safetensors")
    tdlrt.load(f"{folder}/digits.safetensors", restored)
with torch.no_grad():
    accuracy = (restored(test_images).argmax(1) == test_labels).float().mean().item()

print("after", tdlrt.summary(restored), sep="\n")
print(f"test accuracy {accuracy:.1%}")
