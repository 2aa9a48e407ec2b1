"""The fused layer of queries, keys and values of GPT-2 as a matrix and as a tensor, at equal size.

    python benchmarks/fused_qkv.py

A small GPT-2 learns the characters of Python's standard library. Its layers `c_attn` have a quarter
of their weights: truncated after a dense training, and trained in Tucker format from the start at
fixed ranks. Writes benchmarks/results/fused_qkv.json and a section of docs/how-to/transformers.md.
"""

import argparse
import copy
import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import tdlrt
from operations import table_section
from tdlrt_lab.documents import fill_section
from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.files import write_text

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/fused_qkv.json"
DOCUMENT = ROOT / "docs/how-to/transformers.md"
Row = dict[str, Any]

WIDTH, CONTEXT, BATCH, STEPS, RATE = 64, 64, 16, 400, 3e-3
SEEDS, SHARE, CHARACTERS = (0, 1), 0.25, 128
MODES = ((3, WIDTH), (WIDTH,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fill", action="store_true", help="only write the section")
    if not parser.parse_args().fill:
        measure()
    fill_section(DOCUMENT, "fused_qkv", section(json.loads(RESULT.read_text("utf-8"))))


def measure() -> None:
    torch.set_num_threads(1)
    train, test = text()
    budget = SHARE * 3 * WIDTH * WIDTH
    ranks = {"matrix": matrix_rank(budget), "tensor": tensor_ranks(budget)}
    rows: list[Row] = []
    for seed in SEEDS:
        dense = network(seed)
        optimizer = torch.optim.AdamW(dense.parameters(), lr=RATE)
        learn(dense, optimizer, train, seed)
        rows.append({"seed": seed, "form": "dense", "bits": bits(dense, test)})
        for form, rank in ranks.items():
            cut = copy.deepcopy(dense)
            report = factorized(cut, form, rank, init_scale=None)
            error = statistics.mean(row.change or 0.0 for row in report.factorized)
            row = {"seed": seed, "form": form, "ranks": rank, "error": error}
            row["parameters"] = sum(one.parameters for one in report.factorized)
            row["truncated_bits"] = bits(cut, test)
            fresh = network(seed)
            factorized(fresh, form, rank, init_scale="auto")
            fixed: Row = {"lr": RATE, "rank_policy": tdlrt.FixedRank()}
            learn(fresh, tdlrt.TDLRT(fresh, torch.optim.AdamW, **fixed), train, seed)
            rows.append(row | {"bits": bits(fresh, test)})
            print(rows[-1], flush=True)
    result = {
        **made_by("python benchmarks/fused_qkv.py"),
        "rows": rows,
    }
    write_text(RESULT, json.dumps(result, indent=1) + "\n")


def text() -> tuple[Tensor, Tensor]:
    """The standard library as character codes: nine tenths to learn from, one to test on."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:120]
    joined = "".join(path.read_text("utf-8", errors="ignore") for path in files)
    codes = torch.tensor([ord(one) for one in joined if ord(one) < CHARACTERS])
    cut = len(codes) * 9 // 10
    return codes[:cut], codes[cut:]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"n_positions": CONTEXT, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=CHARACTERS, loss_type="ForCausalLM", **sizes, **rates, **ends)
    return GPT2LMHeadModel(config)


def matrix_rank(budget: float) -> tuple[int, ...]:
    fits = [r for r in range(1, WIDTH) if 4 * WIDTH * r + r * r <= budget]
    return (fits[-1], fits[-1])


def tensor_ranks(budget: float) -> tuple[int, ...]:
    fits = [r for r in range(1, WIDTH) if 9 + 2 * WIDTH * r + 3 * r * r <= budget]
    return (3, fits[-1], fits[-1])


def factorized(
    model: nn.Module, form: str, rank: tuple[int, ...], init_scale: Any
) -> tdlrt.surgery.FactorizationReport:
    reshape = {"*.c_attn": MODES} if form == "tensor" else None
    return tdlrt.factorize_(
        model, rank=rank, include="*.c_attn", init_scale=init_scale, reshape=reshape
    )


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, codes: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    model.train()
    for _ in range(STEPS):
        tokens = batch(codes, BATCH, generator)
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        schedule.step()


def batch(codes: Tensor, size: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(codes) - CONTEXT, (size,), generator=generator)
    return torch.stack([codes[start : start + CONTEXT] for start in starts.tolist()])


@torch.no_grad()
def bits(model: nn.Module, codes: Tensor) -> float:
    """Bits per character on text that was not learnt from."""
    tokens = batch(codes, 256, torch.Generator().manual_seed(99))
    return model.eval()(tokens, labels=tokens).loss.item() / math.log(2)


def section(result: Row) -> list[str]:
    """Lines of the section: means over the seeds."""
    head = ["c_attn", "ranks", "parameters", "error of truncation", "bits after it"]
    head.append("bits, trained so")
    rows: Sequence[Row] = result["rows"]

    def mean(form: str, what: str) -> str:
        values = [row[what] for row in rows if row["form"] == form]
        return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    lines = [["dense", "-", f"{3 * WIDTH * WIDTH:,}", "-", "-", mean("dense", "bits")]]
    for form in ("matrix", "tensor"):
        one = next(row for row in rows if row["form"] == form)
        size = f"{one['parameters'] // 2:,}"
        cells = [mean(form, what) for what in ("error", "truncated_bits", "bits")]
        lines.append([form, "x".join(map(str, one["ranks"])), size, *cells])
    return table_section(result, TEXT, head, lines)


TEXT = f"""\
A GPT-2 of two layers and width {WIDTH} on the characters of Python's standard library, with a
quarter of the weights of `c_attn`. Bits per character on text that was not learnt from: of the
dense network after a truncation, and of a network trained in Tucker format from the start at fixed
ranks. Means over {len(SEEDS)} seeds with the least and the largest value."""


if __name__ == "__main__":
    main()
