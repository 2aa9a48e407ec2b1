"""What the penalty on the cores' spectra does for accuracy under attack, on MNIST.

    python benchmarks/robustness.py --data-dir DATA_DIR

Attacks networks of the experiments `mnist_budget` and `mnist_robustness` (in experiments/recorded),
whose runs must be there (`python benchmarks/accuracy.py --only mnist_budget mnist_robustness`).
FGSM moves every pixel by eps along the sign of the loss gradient; PGD takes 10 such steps of
eps / 4 from a random start and stays within eps. Pixels are in [0, 1]. The first `--images` test
images are attacked. Writes benchmarks/results/robustness.json and docs/robustness.md.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdlrt
from comparisons import EXPERIMENTS
from tdlrt_lab.data import ImageData, load_data
from tdlrt_lab.run.accuracy import accuracy
from tdlrt_lab.run.checkpoint import load_checkpoint
from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.files import write_text
from tdlrt_lab.run.training import Training
from tdlrt_lab.spread import format_spread
from tdlrt_lab.sweep.plan import read_sweep

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/robustness.json"
DOCUMENT = ROOT / "docs/robustness.md"
NETWORKS = (
    ("mnist_budget", "dense_adam"),
    ("mnist_budget", "budget_0.05"),
    ("mnist_robustness", "penalty_0.001"),
    ("mnist_robustness", "penalty_0.01"),
)
EPS = (0.05, 0.1, 0.2)
PGD_STEPS = 10
BATCH = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with mnist/test.parquet; default: the hub")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="of accuracy.py")
    parser.add_argument("--images", type=int, default=2000, help="test images to attack")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    data = load_data("mnist", arguments.data_dir)
    rows = []
    for experiment, row in NETWORKS:
        sweep = read_sweep(EXPERIMENTS[experiment], {"seeds": arguments.seeds})
        for run in sweep.runs(arguments.runs / experiment):
            if run.row == row:
                training = Training(run.config, data)
                load_checkpoint(training, run.directory.checkpoint)
                rows.append(
                    {"row": row, "seed": run.config.seed, "method": run.config.method}
                    | {"weight": run.config.spectral_penalty}
                    | measure(training, data, arguments.images)
                )
                print(rows[-1], flush=True)
    command = f"python benchmarks/robustness.py --data-dir DATA_DIR --images {arguments.images}"
    result = {
        **made_by(command),
        "images": arguments.images,
        "rows": rows,
    }
    write_text(RESULT, json.dumps(result, indent=2) + "\n")
    DOCUMENT.write_text(document(result), encoding="utf-8")


def measure(training: Training, data: ImageData, count: int) -> dict[str, Any]:
    """Accuracies in percent, without and with attack, and the condition of the cores."""
    model = nn.Sequential(Normalise(data), training.model).eval()
    images = data.test_images[:count].float() / 255
    labels = data.test_labels[:count]
    generator = torch.Generator().manual_seed(0)
    measured: dict[str, Any] = {
        "parameters": tdlrt.summary(training.model).parameters,
        "condition": condition(training.model),
        "clean": accuracy(model, images, labels),
    }
    for eps in EPS:
        attacked = attack(model, images, labels, eps, step=eps, steps=1)
        measured[f"fgsm_{eps:g}"] = accuracy(model, attacked, labels)
        noise = eps * (2 * torch.rand(images.shape, generator=generator) - 1)
        attacked = attack(model, images, labels, eps, step=eps / 4, steps=PGD_STEPS, start=noise)
        measured[f"pgd_{eps:g}"] = accuracy(model, attacked, labels)
    return measured


class Normalise(nn.Module):
    """Pixels in [0, 1] to what the network was trained on."""

    def __init__(self, data: ImageData) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(data.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(data.std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Pixels minus mean over deviation, per channel."""
        return (x - self.mean) / self.std


def attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    step: float,
    steps: int,
    start: Tensor | None = None,
) -> Tensor:
    """Images within eps of the given ones, moved up the loss: FGSM with one step, else PGD."""
    moved = images if start is None else (images + start).clamp(0, 1)
    for _ in range(steps):
        parts = []
        for x, y in zip(moved.split(BATCH), labels.split(BATCH), strict=True):
            x = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
            parts.append(x.detach() + step * slope.sign())
        moved = torch.minimum(torch.maximum(torch.cat(parts), images - eps), images + eps)
        moved = moved.clamp(0, 1)
    return moved


@torch.inference_mode()
def condition(model: nn.Module) -> float | None:
    """Geometric mean, over layers and modes, of the condition number of the unfolded core."""
    logs = []
    for module in model.modules():
        if isinstance(module, tdlrt.nn.TuckerLayer):
            for mode in module.learned_modes:
                values = torch.linalg.svdvals(module.core.movedim(mode, 0).flatten(1).double())
                logs.append(float(torch.log(values[0] / values[-1])))
    return math.exp(statistics.fmean(logs)) if logs else None


def document(result: dict[str, Any]) -> str:
    """docs/robustness.md."""
    columns = [f"{kind}_{eps:g}" for kind in ("fgsm", "pgd") for eps in EPS]
    heads = [f"{kind}, eps {eps:g}" for kind in ("FGSM", "PGD") for eps in EPS]
    lines = [
        "# Robustness and the spectrum of the cores",
        "",
        "Does a network in Tucker format withstand changes of its input that are made to deceive",
        "it, and does a penalty on the spectrum of the cores help? This page gives the accuracy",
        "under two attacks.",
        "",
        f"Written by `{result['command']}`, with the numbers in",
        "`benchmarks/results/robustness.json`; do not edit.",
        "",
        "`tdlrt.spectral_penalty` pulls the singular values of the unfolded cores together (the",
        "idea of arXiv:2505.08022 for matrices). It counts once the ranks are frozen, with the",
        "weight of the first column (`--spectral-penalty`). LeNet-5 on MNIST with the recipe of",
        "budget_0.05 in the [results](results.md); accuracy in percent on the first",
        f"{result['images']} test images, mean and spread over the seeds; *condition* is the",
        "geometric mean of the condition numbers of the unfolded cores. FGSM moves every pixel, in",
        "[0, 1], by eps; PGD takes 10 steps of eps / 4 within eps.",
        "",
        f"| weight | seeds | parameters | condition | clean | {' | '.join(heads)} |",
        "| --- " * (5 + len(columns)) + "|",
    ]
    for name in dict.fromkeys(row["row"] for row in result["rows"]):
        group = [row for row in result["rows"] if row["row"] == name]
        dense = group[0]["method"] == "dense"
        weight = "dense network" if dense else f"{group[0]['weight']:g}"
        size = "" if dense else f"{statistics.fmean(r['parameters'] for r in group):,.0f}"
        kappa = "" if dense else f"{statistics.fmean(r['condition'] for r in group):.1f}"
        cells = [format_spread([row[column] for row in group], 1) for column in ("clean", *columns)]
        lines.append(f"| {weight} | {len(group)} | {size} | {kappa} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
