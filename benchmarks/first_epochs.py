"""Whether networks learn from the first epoch on with the defaults, beside dense ones.

    python benchmarks/first_epochs.py

Scikit-learn's digits, batch 50, six epochs; SGD with momentum 0.9 at rate 0.05 and AdamW at 0.002,
the same for dense. A network passes if it is within 15 points of dense after three epochs and
within 3 at the end. Writes benchmarks/results/first_epochs.json, run after run (what is there is
not run again), and a section of docs/algorithm.md.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdlrt
from operations import provenance, table
from resumable import combinations, measured
from small_training import train_epochs
from tdlrt_lab.data import load_data
from tdlrt_lab.documents import fill_section
from tdlrt_lab.models import build_model

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/first_epochs.json"
DOCUMENT = ROOT / "docs/algorithm.md"
Row = dict[str, Any]

BATCH, EPOCHS = 50, 6
AFTER_THREE, AT_THE_END = 15, 3
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], Row]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.002}),
}


FEW = ((16, False), (32, True), (32, False), (64, True))
MANY = (*[(16, False)] * 2, (16, True), *[(32, False)] * 4, (32, True), *[(64, False)] * 3)
"""Width of each convolution, and whether the map is halved behind it."""


def cnn(
    norm: Callable[[int], nn.Module] | None = None, layers: Sequence[tuple[int, bool]] = FEW
) -> nn.Module:
    """3x3 convolutions and a linear head."""
    net, channels = nn.Sequential(), 1
    for width, pools in layers:
        net.append(nn.Conv2d(channels, width, 3, padding=1))
        if norm is not None:
            net.append(norm(width))
        net.append(nn.ReLU())
        if pools:
            net.append(nn.MaxPool2d(2))
        channels = width
    return net.extend([nn.Flatten(), nn.Linear(4 * channels, 10)])


def mlp(depth: int, width: int = 128, between: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Linear layers with activations in between."""
    net, features = nn.Sequential(nn.Flatten()), 64
    for _ in range(depth - 1):
        net.extend([nn.Linear(features, width), between()])
        features = width
    return net.append(nn.Linear(features, 10))


def he(net: nn.Module) -> nn.Module:
    """The network with He's initialisation."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return net


class VisionTransformer(nn.Module):
    """Patches of 2x2 pixels, blocks as in torch's encoder, the mean over all patches."""

    def __init__(self, depth: int = 2, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)]
            )
            for _ in range(depth)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Linear(4 * width, width),
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of 8x8 images."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places
        for (norm, inward, outward), block in zip(self.blocks, self.mlps, strict=True):
            heads = inward(norm(x)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            attention = F.scaled_dot_product_attention(*heads)
            x = x + outward(attention.transpose(1, 2).flatten(2))
            x = x + block(x)
        return self.head(self.norm(x).mean(1))


class RowTransformer(nn.Module):
    """The rows of 8 pixels as tokens, torch's encoder with the norms after each block."""

    def __init__(self, depth: int = 3, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.places = nn.Parameter(0.02 * torch.randn(8, width))
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of 8x8 images."""
        return self.head(self.encoder(self.embed(images.squeeze(1)) + self.places).mean(1))


def signals() -> nn.Module:
    """Three convolutions along the columns of an image, whose 8 rows are channels."""
    net, channels = nn.Sequential(nn.Flatten(1, 2)), 8
    for width in (64, 128, 128):
        net.extend([nn.Conv1d(channels, width, 3, padding=1), nn.ReLU()])
        channels = width
    return net.extend([nn.Flatten(), nn.Linear(8 * channels, 10)])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain CNN, 5 layers": cnn,
    "LeNet-5": lambda: build_model("lenet5", (1, 8, 8), classes=10),
    "MLP, 6 layers": lambda: mlp(6),
    "CNN with batch norm": lambda: cnn(nn.BatchNorm2d),
    "vision transformer": VisionTransformer,
    "MLP, 10 layers": lambda: mlp(10),
    "transformer of rows, norms last": RowTransformer,
    "CNN of 8 signals": signals,
    "vision transformer, 4 blocks": lambda: VisionTransformer(4),
    "CNN, He's initialisation": lambda: he(cnn()),
    "MLP of 10 layers, He's initialisation": lambda: he(mlp(10)),
    "CNN of 12 narrow layers, He's initialisation": lambda: he(cnn(layers=MANY)),
    "MLP, 3 layers, sigmoid": lambda: mlp(3, between=nn.Sigmoid),
}
CHECKED = tuple(NETWORKS)[:9]
"""Those that are to pass; the others show how far the default carries."""


def digits() -> list[Tensor]:
    """Training images and labels, then those of the test."""
    data = load_data("digits")
    images = [data.normalise(part) for part in (data.train_images, data.test_images)]
    return [images[0], data.train_labels, images[1], data.test_labels]


def train(
    network: str,
    optimizer: str,
    seed: int,
    data: Sequence[Tensor],
    start: Row | None = None,
    epochs: int = EPOCHS,
    **options: Any,
) -> list[float]:
    """Test accuracy in per cent after each epoch.

    Args:
        network: One of `NETWORKS`.
        optimizer: One of `OPTIMIZERS`.
        seed: Of the initial weights and of the order of the images.
        data: `digits()`.
        start: Arguments of `factorize_`; None for the dense network.
        epochs: Passes over the training images.
        options: Arguments of `TDLRT`; a budget gets the number of steps.
    """
    torch.manual_seed(seed)
    model = NETWORKS[network]()
    kind, arguments = OPTIMIZERS[optimizer]
    if start is None:
        stepper = kind(model.parameters(), **arguments)
    else:
        tdlrt.factorize_(model, **start)
        if "budget" in options:
            options["total_steps"] = epochs * math.ceil(len(data[0]) / BATCH)
        stepper = tdlrt.TDLRT(model, kind, **arguments, **options)
    order = torch.Generator().manual_seed(seed)
    trained = train_epochs(model, stepper, data, batch=BATCH, epochs=epochs, order=order)
    return [round(epoch.accuracy, 1) for epoch in trained]


def passes(ours: Sequence[float], dense: Sequence[float]) -> bool:
    """Whether accuracies by epoch are near enough to those of the dense network."""
    return ours[2] >= dense[2] - AFTER_THREE and ours[-1] >= dense[-1] - AT_THE_END


STARTS: dict[str, tuple[Row | None, Row]] = {
    "dense": (None, {}),
    "default": ({}, {}),
    "budget 0.1": ({}, {"budget": 0.1}),
    "norm 1": ({"init_scale": 1.0}, {}),
    "norm 0.3": ({"init_scale": 0.3}, {}),
    "rank 0.75": ({"rank": 0.75}, {}),
    "budget 0.1, every 2": ({}, {"budget": 0.1, "adapt_every": 2}),
}
SEEDS = (0, 1)
DEFAULTS = 3
"""How many starts use nothing but defaults; they are run first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fill", action="store_true", help="only write the section")
    if not parser.parse_args().fill:
        measure()
    fill_section(DOCUMENT, "first_epochs", section(json.loads(RESULT.read_text("utf-8"))))


def measure() -> None:
    """Run what is not there yet."""
    torch.set_num_threads(1)
    data = digits()

    def accuracies(network: str, optimizer: str, seed: int, start: str) -> Row:
        given, options = STARTS[start]
        return {"accuracies": train(network, optimizer, seed, data, given, **options)}

    runs = [
        run
        for starts in (tuple(STARTS)[:DEFAULTS], tuple(STARTS)[DEFAULTS:])
        for run in combinations(seed=SEEDS, network=NETWORKS, optimizer=OPTIMIZERS, start=starts)
    ]
    measured(RESULT, "python benchmarks/first_epochs.py", runs, accuracies)


def section(result: Row) -> list[str]:
    """Lines of the section."""
    found: dict[tuple[str, str, int], dict[str, list[float]]] = {}
    for row in result["rows"]:
        key = row["network"], row["optimizer"], row["seed"]
        found.setdefault(key, {})[row["start"]] = row["accuracies"]
    lines = []
    for (network, optimizer, seed), of in found.items():
        cells = []
        for start in STARTS:
            if start not in of:
                cells.append("")
                continue
            mark = "" if passes(of[start], of["dense"]) else " (fails)"
            cells.append(f"{of[start][2]:.1f}, {of[start][-1]:.1f}{mark}")
        lines.append([network, optimizer, str(seed), *cells])
    return [
        f"Written by `{result['command']}`: test accuracy (%) on scikit-learn's digits after three",
        f"and after six epochs. *Fails* is more than {AFTER_THREE} points below dense after three",
        f"or more than {AT_THE_END} at the end. *Budget 0.1* is with `total_steps`,",
        "and *every 2* with `adapt_every=2`.",
        "",
        *table(["network", "optimiser", "seed", *STARTS], lines),
        "",
        *(f"- {fact}" for fact in provenance([result])),
    ]


if __name__ == "__main__":
    main()
