"""Time and memory of single Tucker layers against the dense layer they stand for.

    python benchmarks/forward_paths.py

Each ratio is the least time of the Tucker layer over that of the dense one, both in the faster
of the two memory layouts, taken in turn on one thread. *Plain* is what `to_plain` makes of the
layer for this input. Memory is what a training step keeps: tensors saved for the backward pass,
parameters and gradients. Writes benchmarks/results/forward_paths.json and docs/forward-paths.md.
"""

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allocator import keep_freed_memory
from saved import saved_bytes
from tdlrt.nn import TuckerConv2d, TuckerLayer, TuckerLinear
from tdlrt.nn.calls import LayerCall
from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.files import write_text

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/forward_paths.json"
PAGE = ROOT / "docs/forward-paths.md"

# Shape of the weight, size of the image, padding, whether it is the first layer of its network.
LAYERS: dict[str, tuple[tuple[int, ...], int, int, bool]] = {
    "LeNet conv1": ((20, 1, 5, 5), 28, 0, True),
    "LeNet conv2": ((50, 20, 5, 5), 12, 0, False),
    "LeNet fc1": ((500, 800), 0, 0, False),
    "VGG16 conv1_1": ((64, 3, 3, 3), 32, 1, True),
    "VGG16 conv1_2": ((64, 64, 3, 3), 32, 1, False),
    "VGG16 conv2_2": ((128, 128, 3, 3), 16, 1, False),
    "VGG16 conv3_2": ((256, 256, 3, 3), 8, 1, False),
    "VGG16 conv4_2": ((512, 512, 3, 3), 4, 1, False),
    "VGG16 conv5_2": ((512, 512, 3, 3), 2, 1, False),
}
RANKS: tuple[float | str, ...] = (0.1, 0.2, 0.5, "full")
IN_A_ROW, SHORT = 5, 5e-3  # seconds
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256], help="batch sizes")
    parser.add_argument("--repetitions", type=int, default=4, help="of each measurement, at least")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each row, at least")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    rows = []
    for name, batch, rank in itertools.product(LAYERS, arguments.batches, RANKS):
        rows.append(measure(name, batch, rank, arguments.repetitions, arguments.seconds))
        print(line(rows[-1]), flush=True)
    result = {
        **made_by("python benchmarks/forward_paths.py"),
        "rows": rows,
    }
    write_text(RESULT, json.dumps(result, indent=2) + "\n")
    PAGE.write_text(document(result), encoding="utf-8")


def measure(
    name: str, batch: int, rank: float | str, repetitions: int, seconds: float
) -> dict[str, Any]:
    """One row of the table: times in ms, chosen paths and bytes."""
    shape, size, padding, first = LAYERS[name]
    torch.manual_seed(0)
    dense, tucker = make_layers(shape, padding, rank)
    row: dict[str, Any] = {"layer": name, "batch": batch, "rank": rank, "ranks": tucker.ranks}
    passes: dict[tuple[str, str], Callable[[], None]] = {}
    for layout in LAYOUTS if size else LAYOUTS[:1]:
        x = make_input((batch, shape[1], size, size) if size else (batch, shape[1]), layout, first)
        where = str(layout).removeprefix("torch.").removesuffix("_format")
        call = LayerCall(input=x, output=())
        options = {"channels_last": call.channels_last}
        planned = tucker.plan_shape(x.shape, **options, input_grad=not first)
        plain_path = tucker.plain_path([planned], "speed")
        network = {"dense": dense, "tucker": tucker, "plain": tucker.to_plain(plain_path)}
        for kind, layer in network.items():
            if kind != "tucker" and size:
                layer = copy.deepcopy(layer).to(memory_format=layout)
            passes[f"inference, {kind}", where] = forward(layer, x)
            if kind != "plain":
                passes[f"training, {kind}", where] = forward_and_backward(layer, x)
        for purpose in ("training", "inference"):
            row[f"path, {purpose}, {where}"] = tucker.planned_path(planned, purpose)
        row[f"path, plain, {where}"] = plain_path
        if layout is LAYOUTS[0]:
            row["bytes, dense"], row["bytes, tucker"] = kept(dense, x), kept(tucker, x)
            tucker.recompute = True
            row["bytes, recompute"] = kept(tucker, x)
            tucker.recompute = False
    for (what, where), least in least_times(passes, repetitions, seconds).items():
        row[f"ms, {what}, {where}"] = 1e3 * least
    return row


def make_layers(
    shape: Sequence[int], padding: int, rank: Any
) -> tuple[nn.Conv2d | nn.Linear, TuckerLayer]:
    outputs, inputs, *kernel = shape
    if kernel:
        conv = nn.Conv2d(inputs, outputs, kernel[0], padding=padding)
        return conv, TuckerConv2d.from_conv(conv, rank=rank)
    linear = nn.Linear(inputs, outputs)
    return linear, TuckerLinear.from_linear(linear, rank=rank)


def make_input(shape: Sequence[int], layout: torch.memory_format, first: bool) -> Tensor:
    x = torch.randn(*shape)
    if layout is torch.channels_last:  # strides that say so with one channel too
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return x.requires_grad_(not first)


def forward(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def forward_and_backward(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    leaves = [*layer.parameters(), *([x] if x.requires_grad else [])]
    gradient = torch.randn_like(layer(x))

    def run() -> None:
        torch.autograd.grad(layer(x), leaves, gradient)

    return run


def least_times(
    passes: dict[Any, Callable[[], None]], repetitions: int, seconds: float
) -> dict[Any, float]:
    least = dict.fromkeys(passes, float("inf"))
    end = float("inf")
    for repetition in itertools.count():
        for key, run in passes.items():
            # Short ones several times in a row: what ran before has emptied the caches.
            for _ in range(IN_A_ROW if least[key] < SHORT else 1):
                start = time.perf_counter()
                run()
                if repetition:  # the first one warms up
                    least[key] = min(least[key], time.perf_counter() - start)
        end = end if repetition else time.perf_counter() + seconds
        if repetition >= repetitions and time.perf_counter() > end:
            return least
    raise AssertionError


def kept(layer: nn.Module, x: Tensor) -> int:
    """Bytes of saved tensors, parameters and gradients of a training step."""
    activations, _ = saved_bytes(layer, lambda: layer(x))
    return activations + sum(2 * parameter.nbytes for parameter in layer.parameters())


def ratio(row: dict[str, Any], mode: str, kind: str) -> tuple[float, str]:
    """Of the times in the faster layouts, and the path taken in that layout."""

    def best(what: str) -> tuple[float, str]:
        prefix = f"ms, {what}, "
        return min((ms, key[len(prefix) :]) for key, ms in row.items() if key.startswith(prefix))

    time_, where = best(f"{mode}, {kind}")
    path = row[f"path, {mode if kind == 'tucker' else kind}, {where}"]
    return time_ / best(f"{mode}, dense")[0], path


def line(row: dict[str, Any]) -> str:
    cells = [row["layer"], row["batch"], row["rank"]]
    for mode, kind in (("training", "tucker"), ("inference", "tucker"), ("inference", "plain")):
        value, path = ratio(row, mode, kind)
        cells += [f"{value:.2f}", path]
    for kind in ("tucker", "recompute"):
        cells.append(f"{row[f'bytes, {kind}'] / row['bytes, dense']:.2f}")
    return f"| {' | '.join(map(str, cells))} |"


def document(result: dict[str, Any]) -> str:
    """The page docs/forward-paths.md."""
    facts = [
        ", ".join(f"{key} {value}" for key, value in result[name].items())
        for name in ("versions", "machine")
    ]
    table = "\n".join(map(line, result["rows"]))
    return f"""\
# Forward paths, measured

How fast is a single layer in Tucker format, and which of the ways to compute it is the fastest?
This page gives times and memory for layers of several networks, batch sizes and ranks.

Written by `{result["command"]}`; do not edit.

Single layers relative to the dense layer, both in the faster of the two memory layouts (least
times, taken in turn, one thread). *Plain* is what `to_plain` makes of it for this input with
`prefer="speed"`. *Memory* is what a training step keeps: saved tensors, parameters and gradients;
*recompute* the same with `layer.recompute = True`. `rank` is the share of the channels. The
allocator keeps freed memory ([why](training-loops.md#time-on-a-cpu)).

| layer | batch | rank | training | path | inference | path | plain | path | memory | recompute |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}

{facts[0]}; {facts[1]}
"""


if __name__ == "__main__":
    main()
