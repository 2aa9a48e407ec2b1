"""Networks for the tests of files. Run as a script, this writes tests/data/format1.safetensors:

PYTHONPATH=src python tests/serialization/networks.py

That file stays as it is: it shows that files of format 1 keep loading. A new format gets a
new file.
"""

from pathlib import Path

import torch
from torch import nn

import tdlrt

FORMAT_1 = Path(__file__).parents[1] / "data" / "format1.safetensors"
RANKS = {"conv": (2, 2, 3, 2), "channels": (3, 2, 3, 3), "linear": (4, 4)}


class Network(nn.Module):
    """Of everything a little: three layers to factorise, running statistics, tied weights."""

    def __init__(self, width=6):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.channels = nn.Conv2d(4, 5, 3)
        self.linear = nn.Linear(20, width)
        self.head = nn.Linear(width, width)
        self.twin = nn.Linear(width, width)
        self.twin.weight = self.head.weight

    def forward(self, x):
        x = self.channels(torch.relu(self.norm(self.conv(x))))
        return self.twin(self.head(torch.relu(self.linear(x.flatten(1)))))


def dense(seed=0, width=6):
    torch.manual_seed(seed)
    return Network(width)


def tucker(seed=0, ranks=RANKS):
    model = dense(seed)
    for modes, name in (("all", "conv"), ("channels", "channels"), ("all", "linear")):
        tdlrt.factorize_(model, rank=ranks[name], modes=modes, include=name)
    return model


def set_values(model):
    """Values that no random generator of a later version can change."""
    with torch.no_grad():
        for number, (_, value) in enumerate(sorted(model.state_dict().items()), start=1):
            value.copy_(torch.arange(value.numel()).view(value.shape).mul(number).sin().mul(50))
    return model


if __name__ == "__main__":
    tdlrt.save(set_values(tucker()), FORMAT_1, metadata={"tau": "0.1"})
