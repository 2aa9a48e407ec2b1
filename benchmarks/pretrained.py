"""A trained network put in Tucker format: truncation weighted by the inputs against the plain one.

    python benchmarks/pretrained.py --data-dir DATA_DIR

LeNet-5 is trained dense for 2 epochs on the first 20,000 images of MNIST, factorised at equal ranks
in both ways, and fine-tuned with `TDLRT` at these ranks on the first 6,000, once. Covariances come
from the first 1,000. Writes benchmarks/results/pretrained.json and the table in docs/adapters.md.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdlrt
from tdlrt_lab.data import ImageData, load_data
from tdlrt_lab.documents import fill_section
from tdlrt_lab.models import build_model
from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.exporting import accuracy_on
from tdlrt_lab.run.files import write_text
from tdlrt_lab.spread import format_spread

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/pretrained.json"
DOCUMENT = ROOT / "docs/adapters.md"
RANKS = (0.3, 0.1, 0.05)
SEEDS = (0, 1, 2)
BATCH = 64
IMAGES, TUNING, SAMPLE = 20_000, 6000, 1000
RATE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with mnist/train.parquet; default: the hub")
    arguments = parser.parse_args()
    data = load_data("mnist", arguments.data_dir, train_images=IMAGES)
    rows = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        dense = build_model("lenet5", data.image_shape, len(data.classes))
        train(dense, torch.optim.Adam(dense.parameters(), RATE), data, IMAGES, epochs=2)
        before = accuracy_on(dense.eval(), data)
        sample = [images for images, _ in batches(data, torch.arange(SAMPLE))]
        covariances = tdlrt.input_covariances(dense, sample)
        for rank in RANKS:
            for name, given in (("plain", None), ("weighted", covariances)):
                rows.append({"seed": seed, "rank": rank, "truncation": name, "dense": before})
                rows[-1] |= measure(dense, data, rank, given, seed)
                print(rows[-1], flush=True)
    result = {
        **made_by("python benchmarks/pretrained.py --data-dir DATA_DIR"),
        "rows": rows,
    }
    write_text(RESULT, json.dumps(result, indent=1) + "\n")
    write_table(rows)


def measure(
    dense: nn.Module,
    data: ImageData,
    rank: float,
    covariances: dict[str, Tensor] | None,
    seed: int,
) -> dict[str, Any]:
    """Accuracies right after the truncation and after fine-tuning."""
    model = copy.deepcopy(dense)
    scale = None if covariances is None else "auto"
    tdlrt.factorize_(model, rank=rank, init_scale=scale, covariances=covariances)
    truncated = accuracy_on(model.eval(), data)
    torch.manual_seed(1000 + seed)
    policy = tdlrt.FixedRank()
    optimizer = tdlrt.TDLRT(model, torch.optim.Adam, lr=RATE, rank_policy=policy)
    train(model, optimizer, data, TUNING, epochs=1)
    sizes = tdlrt.summary(model)
    return {
        "parameters": sizes.parameters,
        "compression": sizes.compression,
        "truncated": truncated,
        "tuned": accuracy_on(model.eval(), data),
    }


def batches(data: ImageData, order: Tensor, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    for part in order.split(size):
        yield data.normalise(data.train_images[part]), data.train_labels[part]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: ImageData, images: int, epochs: int
) -> None:
    """Train on the first images, with a cosine schedule."""
    model.train()
    steps = epochs * -(-images // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for x, y in batches(data, torch.randperm(images)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()


def write_table(rows: list[dict[str, Any]]) -> None:
    """Put the comparison in the document."""
    heads = ["rank", "compression (%)", "truncation", "right after (%)", "fine-tuned (%)"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for rank in RANKS:
        for name in ("plain", "weighted"):
            group = [row for row in rows if (row["rank"], row["truncation"]) == (rank, name)]
            compression = 100 * statistics.fmean(row["compression"] for row in group)
            cells = [f"{rank:g}", f"{compression:.1f}", name]
            cells += [
                format_spread([row[key] for row in group], 2) for key in ("truncated", "tuned")
            ]
            lines.append(f"| {' | '.join(cells)} |")
    dense = format_spread([row["dense"] for row in rows if row["rank"] == RANKS[0]][::2], 2)
    lines.append(f"| dense | 0.0 | | {dense} | |")
    fill_section(DOCUMENT, "pretrained", lines)


if __name__ == "__main__":
    main()
