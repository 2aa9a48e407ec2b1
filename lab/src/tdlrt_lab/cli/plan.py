"""`tdlrt plan`: the forward path of each Tucker layer and its estimated cost."""

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from tdlrt.nn import TuckerLayer
from tdlrt.nn.calls import watch_calls, zeros_for
from tdlrt.nn.models import tucker_layers
from tdlrt.paths import LayerShape, Purpose, dense_cost, path_cost
from tdlrt.surgery import factorize_
from tdlrt.text_tables import format_shape
from tdlrt_lab.cli.output import AsJson, Debug, empty_table
from tdlrt_lab.cli.parameters import Batch, Data, Model, Rank
from tdlrt_lab.cli.untrained import untrained
from tdlrt_lab.options import RunOptions

__all__ = ["plan", "plan_layers", "plan_table"]

PURPOSES: tuple[Purpose, ...] = ("training", "inference")


def plan_layers(model: nn.Module, input_size: Sequence[int]) -> list[dict[str, Any]]:
    """Choose the forward path of each Tucker layer at the input shapes of a pass on zeros.

    Args:
        model: A model with Tucker layers, each called once.
        input_size: Shape of the input, with the batch size.

    Returns:
        For each layer its name, shape, ranks and input shape, and for training and inference the
        path and its estimated time relative to the dense layer.
    """
    layers = tucker_layers(model)
    input = zeros_for(model, input_size)
    calls = watch_calls(model, layers.values(), input)
    rows = []
    for name, layer in layers.items():
        call = calls[layer][0]
        shape = layer.plan_shape(
            call.input.shape,
            channels_last=call.channels_last,
            input_grad=call.input is not input,  # the gradient of the images is not computed
        )
        row = {
            "layer": name,
            "shape": list(layer.shape),
            "ranks": list(layer.ranks),
            "input": list(call.input.shape),
        }
        rows.append(row | {purpose: _decision(layer, shape, purpose) for purpose in PURPOSES})
    return rows


def _decision(layer: TuckerLayer, shape: LayerShape, purpose: Purpose) -> dict[str, Any]:
    path = layer.planned_path(shape, purpose)
    ratio = path_cost(path, shape, purpose) / dense_cost(shape, purpose)
    return {"path": path, "of_dense": round(ratio, 3)}


def plan_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The paths and costs as a table."""
    table = empty_table(["layer"], ["shape", "ranks", *PURPOSES])
    for row in rows:
        decisions = [
            f"{row[purpose]['path']:11} {100 * row[purpose]['of_dense']:3.0f} %"
            for purpose in PURPOSES
        ]
        table.add_row(
            row["layer"], format_shape(row["shape"]), format_shape(row["ranks"]), *decisions
        )
    table.caption = "path and its estimated time relative to the dense layer"
    return table


def plan(
    model: Model,
    data: Data,
    batch_size: Batch = None,
    rank: Rank = str(RunOptions.rank),
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the forward path of each Tucker layer and its cost relative to dense.

    The path is the cheapest order of contractions for training and for inference
    according to the calibrated cost model. No data are read and nothing is trained.
    """
    info, network, ranks, batch_size = untrained(model, data, rank, batch_size)
    factorize_(network, rank=ranks)
    layers = plan_layers(network, (batch_size, *info.input_shape))
    if as_json:
        print(
            json.dumps({"model": model, "data": data, "batch_size": batch_size, "layers": layers})
        )
    else:
        Console().print(plan_table(layers))
