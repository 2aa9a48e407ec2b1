"""Data-parallel training against workers, width and rank: bytes, measured pieces, what follows.

    python benchmarks/scaling.py

VGG16 for 32x32 images, SGD with momentum 0.9. Bytes are counted where they are sent: in the
buckets of DistributedDataParallel and in the all-reduces and gathers of cores and bases. Times are
medians, one thread per process: forward and backward, the integrator alone, and whole steps on two
processes. Writes benchmarks/results/scaling.json and docs/scaling.md.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import tdlrt
from tdlrt.integrations.distributed import wrap
from tdlrt.nn.models import tucker_layers
from tdlrt_lab.models import build_model
from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.files import write_text

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/scaling.json"
RANKS = (0.3, 0.2, 0.135, 0.1)  # 0.135 is 95 %
TIMED_RANK = 0.135
WIDTHS = (128, 256, 512, 1024)
BATCH = 64
WORKERS = (1, 2, 4, 8, 16)
GIGABITS = (1, 10, 100)
SGD = {"lr": 1e-6, "momentum": 0.9}
POLICIES = {"fixed": tdlrt.FixedRank(), "examined": tdlrt.RelativeTolerance(0.01)}
ENGINES = ("dense", "every process", "shared out")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed steps, of which the median")
    parser.add_argument("--bytes", action="store_true", help="count bytes and keep the times")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    torch.set_num_threads(1)
    with group(0, 1, tempfile.mkdtemp()):
        sent = [traffic(rank, *case) for rank in (None, *RANKS) for case in cases(rank)]
    if arguments.bytes:
        result = json.loads(RESULT.read_text()) | {"traffic": sent}
    else:
        result = timed(rounds) | {"traffic": sent}
    write_text(RESULT, json.dumps(result, indent=1) + "\n")
    (ROOT / "docs/scaling.md").write_text(document(result), encoding="utf-8")


def timed(rounds: int) -> dict[str, Any]:
    return {
        **made_by(f"python benchmarks/scaling.py --rounds {rounds}"),
        "seed": 0,
        "pieces": [pieces(name, rounds) for name in POLICIES],
        "widths": [width(channels, rounds) for channels in WIDTHS],
        "two_processes": [two_processes(engine, name, rounds) for engine, name in two_cases()],
    }


def cases(rank: float | None) -> list[tuple[str, str]]:
    """Integrators, and the types in which gradients of cores and bases are sent."""
    if rank is None:
        return [("-", "float32")]
    return [(name, dtype) for name in ("parallel", "bug") for dtype in ("float32", "bfloat16")]


def two_cases() -> list[tuple[str, str]]:
    return [("dense", "-"), *((e, name) for e in ENGINES[1:] for name in POLICIES)]


@contextmanager
def group(process: int, count: int, folder: str) -> Iterator[None]:
    """A group of processes on the CPU."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=count
    )
    yield
    dist.destroy_process_group()


def network(rank: float | None) -> nn.Module:
    """VGG16, in Tucker format unless the rank is None."""
    torch.manual_seed(0)
    model = build_model("vgg16", (3, 32, 32), 10).to(memory_format=torch.channels_last)
    if rank is not None:
        tdlrt.factorize_(model, rank=rank)
    return model


def optimizer_for(model: nn.Module, policy: str, **options: Any) -> Any:
    return tdlrt.TDLRT(model, torch.optim.SGD, rank_policy=POLICIES[policy], **SGD, **options)


def closure_for(model: nn.Module, images: int, plain: nn.Module) -> Callable[[], Tensor]:
    """Forward and backward on random images."""
    inputs = torch.randn(images, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (images,))

    def closure() -> Tensor:
        plain.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    return closure


def traffic(rank: float | None, integrator: str, dtype: str) -> Row:
    """Bytes of gradients that a worker hands over in a step, counted."""
    model = network(rank)
    buckets: list[int] = []
    if rank is None:
        engine = DistributedDataParallel(model)
        optimizer: Any = torch.optim.SGD(model.parameters(), **SGD)
    else:
        given = optimizer_for(model, "examined", integrator=integrator)
        engine, optimizer = wrap(model, given, check_every=1000, reduce_dtype=getattr(torch, dtype))

    def count(state: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        state.append(bucket.buffer().nbytes)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    engine.register_comm_hook(buckets, count)
    closure = closure_for(engine, 4, model)
    optimizer.step(closure)  # compares the replicas once
    buckets.clear()
    with counted() as factors:
        optimizer.step(closure)
    size = tdlrt.summary(model)
    return {
        "rank": rank,
        "integrator": integrator,
        "dtype": dtype,
        "gradients": 2 if integrator == "bug" else 1,
        "compression": size.compression,
        "dense_bytes": sum(buckets),
        "factor_bytes": sum(factors),
        "buffer_bytes": sum(buffer.nbytes for buffer in model.buffers()),
    }


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of the collectives that Python calls inside."""
    sizes: list[int] = []
    reduce, gather = dist.all_reduce, dist.all_gather

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.nbytes)
        return reduce(tensor, *args, **kwargs)

    def all_gather(into: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.nbytes)
        return gather(into, tensor, *args, **kwargs)

    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    try:
        yield sizes
    finally:
        dist.all_reduce, dist.all_gather = reduce, gather


def median_ms(work: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[1:])


def exchanged_bytes(model: nn.Module, optimizer: Any) -> int:
    """What all workers together broadcast in a step that is shared out: weights and momenta."""
    tensors: list[Tensor] = []
    for layer in tucker_layers(model).values():
        for parameter in (layer.core, *layer.factors.parameters()):
            tensors += [parameter, *optimizer.state[parameter].values()]
    return sum(tensor.nbytes for tensor in tensors)


def pieces(policy: str, rounds: int) -> Row:
    """Passes and integrator of one process without a group."""
    model = network(TIMED_RANK)
    optimizer = optimizer_for(model, policy)
    passes = {n: median_ms(closure_for(model, n, model), rounds) for n in (BATCH, BATCH // 2)}
    closure_for(model, 4, model)()
    step = median_ms(optimizer.step, rounds)
    return {
        "policy": policy,
        "passes_ms": passes[BATCH],
        "half_batch_passes_ms": passes[BATCH // 2],
        "integrator_ms": step,
        "exchanged_bytes": exchanged_bytes(model, optimizer),
    }


def width(channels: int, rounds: int) -> Row:
    """One 3x3 convolution at a tenth of its ranks."""
    torch.manual_seed(0)
    layer = tdlrt.nn.TuckerConv2d(channels, channels, 3, rank=max(1, channels // 10))
    model = nn.Sequential(layer)
    optimizer = optimizer_for(model, "examined")
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    ms = median_ms(optimizer.step, rounds)
    return {
        "channels": channels,
        "integrator_ms": ms,
        "exchanged_bytes": exchanged_bytes(model, optimizer),
    }


def two_processes(engine: str, policy: str, rounds: int) -> Row:
    """Whole steps on two processes, half a batch each; the slower one counts."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, context) as pool:
            jobs = [pool.submit(worker, n, folder, engine, policy, rounds) for n in range(2)]
            ms = max(job.result() for job in jobs)
    print(engine, policy, ms, flush=True)
    return {"engine": engine, "policy": policy, "step_ms": ms}


def worker(process: int, folder: str, engine: str, policy: str, rounds: int) -> float:
    torch.set_num_threads(1)
    with group(process, 2, folder):
        model = network(None if engine == "dense" else TIMED_RANK)
        if engine == "dense":
            called: nn.Module = DistributedDataParallel(model)
            optimizer: Any = torch.optim.SGD(model.parameters(), **SGD)
        else:
            given = optimizer_for(model, policy)
            called, optimizer = wrap(model, given, shard_integrator=engine == "shared out")
        closure = closure_for(called, BATCH // 2, model)
        return median_ms(lambda: optimizer.step(closure), rounds)


def document(result: Row) -> str:
    """The page docs/scaling.md."""
    dense = next(row for row in result["traffic"] if row["rank"] is None)
    sent = "\n".join(
        f"| {row['rank'] or 'dense'} | {100 * row['compression']:.1f} | {row['integrator']} | "
        f"{row['dtype']} | {row['factor_bytes'] / 1e6:.2f} | {row['dense_bytes'] / 1e6:.2f} | "
        f"{100 * gradient_bytes(row) / gradient_bytes(dense):.1f} | "
        f"{100 * gradient_bytes(row) / gradient_bytes(dense) / row['gradients']:.1f} |"
        for row in result["traffic"]
    )
    widths = "\n".join(
        f"| {row['channels']} | {row['integrator_ms']:.1f} | {row['exchanged_bytes'] / 1e6:.2f} | "
        f"{break_even(row, 2):.2f} | {break_even(row, 16):.2f} |"
        for row in result["widths"]
    )
    measured = "\n".join(
        f"| {row['engine']} | {row['policy']} | {row['step_ms']:.0f} |"
        for row in result["two_processes"]
    )
    alone = "\n".join(
        f"| {row['policy']} | {row['passes_ms']:.0f} | {row['half_batch_passes_ms']:.0f} | "
        f"{row['integrator_ms']:.0f} | {row['exchanged_bytes'] / 1e6:.2f} | "
        f"{break_even(row, 2):.2f} | {break_even(row, 16):.2f} |"
        for row in result["pieces"]
    )
    facts = [
        ", ".join(f"{key} {value}" for key, value in result[name].items())
        for name in ("versions", "machine")
    ]
    return f"""\
# Scaling over workers

What do several workers send each other in a training step, and what does a step cost in time and
memory? This page gives bytes, times and their growth with width and rank.

Written by `{result["command"]}`, seed {result["seed"]}, the bytes again with `--bytes`; do not
edit. How to train on several processes: [distributed training](distributed.md).

## Bytes in a step

Gradients that a worker hands over in a step of VGG16 for 32x32 images, counted where they are
sent: cores and bases in one buffer for each backward pass (with a mark for each parameter, and a
checksum of the ranks), other parameters in the buckets of DistributedDataParallel. `bug` has two
backward passes; of the second, in the augmented bases, it sends the cores alone. *Sent in* is the
type of the messages of cores and bases (`wrap(..., reduce_dtype=torch.bfloat16)`); others, and the
dense network, are sent in float32. An all-reduce over a ring then moves
2 (N - 1) / N times these bytes through each of N workers. Running statistics of batch norms,
{dense["buffer_bytes"] / 1e6:.2f} MB, come on top in both networks.

| rank | compression (%) | integrator | sent in | cores and bases (MB) | others (MB) | \
of dense (%) | for each gradient (%) |
| --- | --- | --- | --- | --- | --- | --- | --- |
{sent}

## Time of a step

Rank {TIMED_RANK}, batch {BATCH}, one thread per process. *Exchanged* is what all workers together
broadcast when the integrator is shared out (`wrap(..., shard_integrator=True)`): weights and
momenta of all Tucker layers. That pays on a network faster than *break-even*, where the time of
sending equals the (1 - 1/N) of the integrator's time that each of N workers saves.

| ranks | passes (ms) | of half a batch (ms) | integrator (ms) | exchanged (MB) | \
break-even, 2 workers (Gbit/s) | 16 workers |
| --- | --- | --- | --- | --- | --- | --- |
{alone}

From these pieces, milliseconds for a step with {BATCH} images per worker, the integrator on *every*
worker or *shared* out, ranks examined in every step, passes and transfers not overlapped:

{predicted(result)}

Measured on two processes of this machine, {BATCH // 2} images each:

| integrator | ranks | step (ms) |
| --- | --- | --- |
{measured}

## Width and rank

One 3x3 convolution with n channels at ranks r = n / 10, ranks examined. Weights and momenta to send
grow as n r + r^2, the integrator's time more slowly ([measured](integrator-cost.md)).

| n | integrator (ms) | exchanged (MB) | break-even, 2 workers (Gbit/s) | 16 workers |
| --- | --- | --- | --- | --- |
{widths}

## Memory

Every worker holds all weights, gradients and momenta ([memory](memory.md)), whether the integrator
is shared out or not, and in a backward pass the buffer of cores and bases of the first table.

{facts[0]}; {facts[1]}
"""


def gradient_bytes(row: Row) -> int:
    return row["factor_bytes"] + row["dense_bytes"]


def break_even(row: Row, workers: int) -> float:
    """Gbit/s from which sharing out pays."""
    saved = row["integrator_ms"] / 1e3 * (1 - 1 / workers)
    return 8e-9 * row["exchanged_bytes"] / saved


def predicted(result: Row) -> str:
    """Table of the time of a step against workers and bandwidth."""
    piece = next(row for row in result["pieces"] if row["policy"] == "examined")
    sent = next(
        gradient_bytes(row)
        for row in result["traffic"]
        if (row["rank"], row["integrator"], row["dtype"]) == (TIMED_RANK, "parallel", "float32")
    )
    lines = [
        "| workers | " + " | ".join(f"{g} Gbit/s: every, shared" for g in GIGABITS) + " |",
        "| --- |" + " --- |" * len(GIGABITS),
    ]
    for workers in WORKERS:
        cells = []
        for gigabits in GIGABITS:
            per_byte = 8e-6 / gigabits
            ring = 2 * (workers - 1) / workers * sent * per_byte
            every = piece["passes_ms"] + ring + piece["integrator_ms"]
            moved = piece["exchanged_bytes"] * per_byte * (workers > 1)
            shared = piece["passes_ms"] + ring + piece["integrator_ms"] / workers + moved
            cells.append(f"{every:.0f}, {shared:.0f}")
        lines.append(f"| {workers} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
