"""`tdlrt bench`: time and memory of a Tucker network against the dense one."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.table import Table

from tdlrt.ranks import RelativeTolerance
from tdlrt.text_tables import format_shape
from tdlrt_lab.cli.output import AsJson, Debug, empty_table, shown_option
from tdlrt_lab.cli.parameters import Batch, Data, Device, Model, Rank
from tdlrt_lab.cli.untrained import untrained
from tdlrt_lab.config import torch_device
from tdlrt_lab.options import TRAINING, RunOptions
from tdlrt_lab.run.timing import compare_networks

__all__ = ["bench", "layer_times", "network_times"]


def network_times(rows: Sequence[dict[str, Any]]) -> Table:
    """Parameters, bytes and times of the networks, and the ratios of the last to the first."""
    numbers = ["parameters", "bytes", "step (ms)", "inference (ms)"]
    table = empty_table(["network"], numbers=numbers)
    for row in rows:
        table.add_row(
            row["network"],
            f"{row['parameters']:,}",
            f"{row['bytes']:,}",
            f"{row['step_ms']:.2f}",
            f"{row['inference_ms']:.2f}",
        )
    table.add_section()
    columns = ("parameters", "bytes", "step_ms", "inference_ms")
    shares = [rows[-1][column] / rows[0][column] for column in columns]
    table.add_row("of dense", *(f"{share:.3f}" for share in shares))
    return table


def layer_times(rows: Sequence[dict[str, Any]]) -> Table:
    """Times of a forward and backward pass of each Tucker layer and of its dense layer."""
    numbers = ["parameters", "dense (ms)", "tucker (ms)", "of dense"]
    table = empty_table(["layer"], ["ranks"], numbers)
    for row in rows:
        table.add_row(
            row["layer"],
            format_shape(row["ranks"]),
            f"{row['parameters']:,}",
            f"{row['dense_ms']:.2f}",
            f"{row['tucker_ms']:.2f}",
            f"{row['tucker_ms'] / row['dense_ms']:.3f}",
        )
    return table


def bench(
    model: Model,
    data: Data,
    batch_size: Batch = None,
    rank: Rank = str(RunOptions.rank),
    threads: Annotated[
        int | None,
        shown_option("Number of torch threads.", TRAINING, min=1, show_default="torch's"),
    ] = None,
    rounds: Annotated[
        int, shown_option("Number of timed rounds; medians are shown.", TRAINING, min=1)
    ] = 5,
    device: Device = RunOptions.device,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare time and size of a network in Tucker format and the dense network.

    Shows parameters, bytes, and milliseconds of inference and of a training step
    that checks the ranks; then the times of each layer. The images, or the text,
    are random, and no data are read.
    """
    info, network, ranks, batch_size = untrained(model, data, rank, batch_size)
    if threads is not None:
        torch.set_num_threads(threads)
    on = torch_device(device)
    images, labels = (part.to(on) for part in info.random_batch(batch_size))
    policy = RelativeTolerance(0.01)  # too small to truncate random weights
    found = compare_networks(network.to(on), images, labels, ranks, policy, rounds)
    if as_json:
        print(json.dumps({"model": model, "data": data, "batch_size": batch_size, **found}))
    else:
        console = Console()
        console.print(network_times(found["networks"]))
        console.print(layer_times(found["layers"]))
