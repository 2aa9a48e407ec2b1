"""`autotune_`: time the forward paths of every Tucker layer on the user's own inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdlrt.errors import PathError
from tdlrt.nn import TuckerLayer
from tdlrt.nn.calls import Inputs, LayerCall, watch_calls
from tdlrt.nn.models import tucker_layers
from tdlrt.paths import PATHS, PathName
from tdlrt.text_tables import format_shape, format_table

__all__ = ["TuningReport", "TuningRow", "autotune_"]

SECONDS_PER_LAYER = 0.2
LEAST_REPETITIONS = 5


@dataclass(frozen=True, kw_only=True)
class TuningRow:
    """The measured times of one layer.

    Attributes:
        name: Name in the model.
        shape: Shape of the weight.
        ranks: (r_1, ..., r_d).
        inputs: Shapes of the inputs of all calls; empty if the model did not call the layer.
        seconds: Shortest time that each path took for all of these calls.
    """

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    seconds: Mapping[PathName, float]

    @property
    def path(self) -> PathName | None:
        """The fastest path; None if the layer was not called."""
        if not self.seconds:
            return None
        return min(self.seconds, key=lambda path: self.seconds[path])


@dataclass(frozen=True, kw_only=True)
class TuningReport:
    """The outcome of `autotune_`; prints as a table.

    Attributes:
        rows: One per Tucker layer.
        training: Whether forward and backward passes were timed, or forward passes alone.
    """

    rows: tuple[TuningRow, ...]
    training: bool

    def __str__(self) -> str:
        header = ["layer", "input", "ranks", *(f"{path} (ms)" for path in PATHS), "path"]
        table = [
            [
                row.name,
                ", ".join(map(format_shape, row.inputs)) or "not called",
                format_shape(row.ranks),
                *(f"{1e3 * row.seconds[path]:.3f}" if row.seconds else "-" for path in PATHS),
                row.path or "-",
            ]
            for row in self.rows
        ]
        passes = "forward and backward" if self.training else "forward"
        return f"{format_table(header, table)}\nshortest times of {passes} passes"


def autotune_(model: nn.Module, example_input: Inputs) -> TuningReport:
    """Time every path of every Tucker layer and set the fastest one as its `path`, in place.

    Forward and backward passes are timed if the model is in training mode, forward passes alone
    otherwise. The layers are timed on the inputs that they get in one forward pass of the model in
    evaluation mode. A measured path is kept when ranks or shapes change, so call this after
    `freeze_ranks()`. `to_plain` with prefer='speed' follows the measured path. Set
    `layer.path = "auto"` to let the library choose again.

    Args:
        model: A model with Tucker layers; only their `path` is changed.
        example_input: A batch with the size, type, device and memory format of later inputs; a
            tuple of inputs or a dict of keyword arguments for a model that takes several.

    Returns:
        A report with a row per Tucker layer; prints as a table.

    Raises:
        NothingMatchedError: The model has no Tucker layer.
        PathError: The example is not a tensor, tuple or dict, or a tensor in it is empty.
    """
    layers = tucker_layers(model)
    _check_example(example_input)
    calls = watch_calls(model, list(layers.values()), example_input)
    rows = []
    for name, layer in layers.items():
        seconds = _measure(layer, calls[layer], model.training) if calls[layer] else {}
        inputs = tuple(tuple(call.input.shape) for call in calls[layer])
        row = TuningRow(
            name=name, shape=layer.shape, ranks=layer.ranks, inputs=inputs, seconds=seconds
        )
        rows.append(row)
    for row, layer in zip(rows, layers.values(), strict=True):
        if row.path:
            layer.path, layer.path_is_measured = row.path, True
    return TuningReport(rows=tuple(rows), training=model.training)


def _check_example(example: Inputs) -> None:
    parts: list[Any] = [example]
    if isinstance(example, tuple | list | Mapping):
        parts = list(example.values() if isinstance(example, Mapping) else example)
    shapes = [tuple(part.shape) for part in parts if isinstance(part, Tensor)]
    if not shapes or any(0 in shape for shape in shapes):
        got = shapes[0] if isinstance(example, Tensor) else shapes or example
        raise PathError(
            f"example_input: got {got!r}, expected a tensor with at least one sample, or a tuple "
            "or dict of such tensors; pass a batch of the size the model will run on"
        )


def _measure(
    layer: TuckerLayer, calls: Sequence[LayerCall], training: bool
) -> dict[PathName, float]:
    """Shortest seconds of each path. Paths take turns, so that a slow moment affects all."""
    inputs = [call.input.detach().requires_grad_(training) for call in calls]
    before, was_measured = layer.path, layer.path_is_measured
    seconds: dict[PathName, float] = dict.fromkeys(PATHS, float("inf"))
    try:
        run = _make_run(layer, inputs, training)
        repetitions, end = 0, float("inf")
        while repetitions <= LEAST_REPETITIONS or time.perf_counter() < end:
            for path in PATHS:
                layer.path = path
                took = _timed(run, inputs[0].device)
                if repetitions:  # the first run only warms up
                    seconds[path] = min(seconds[path], took)
            if not repetitions:
                end = time.perf_counter() + SECONDS_PER_LAYER
            repetitions += 1
    finally:
        layer.path, layer.path_is_measured = before, was_measured
    return seconds


def _make_run(layer: TuckerLayer, inputs: Sequence[Tensor], training: bool) -> Callable[[], None]:
    """A function that runs one pass of a layer on each of the inputs."""
    if not training:

        def forward() -> None:
            with torch.no_grad():
                for input in inputs:
                    layer(input)

        return forward

    leaves = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    with torch.no_grad():
        gradients = [torch.ones_like(layer(input)) for input in inputs]

    def forward_and_backward() -> None:
        outputs = [layer(input) for input in inputs]
        torch.autograd.grad(outputs, [*inputs, *leaves], gradients)

    return forward_and_backward


def _timed(run: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
