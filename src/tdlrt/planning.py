"""The contraction planner: which order of contractions a Tucker layer should be applied in.

A path is a list of stages (small convolutions and matrix products). Its cost is

    sum over stages and passes of  call + product * MACs + position * positions + byte * bytes,

in seconds, with the constants of `RATES`. They were fitted once to measurements by
`benchmarks/calibrate_planner.py`; what matters is their ratios, which decide between paths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

from tdlrt.errors import PathError

__all__ = [
    "MANY_ROWS",
    "PATHS",
    "RATES",
    "UNKNOWN_SIZE",
    "LayerShape",
    "Mode",
    "Path",
    "PathChoice",
    "Rates",
    "Stage",
    "check_path",
    "choose_path",
    "conv_shape",
    "dense_cost",
    "linear_shape",
    "path_cost",
    "path_macs",
    "path_stages",
    "stage_features",
    "stage_kind",
]

Path: TypeAlias = Literal["three_stage", "fold_in", "fold_out", "dense"]
PathChoice: TypeAlias = Path | Literal["auto"]
Mode: TypeAlias = Literal["training", "inference", "plain"]

PATHS: tuple[Path, ...] = ("three_stage", "fold_in", "fold_out", "dense")

UNKNOWN_SIZE = 32
"""Stands for a size that is not known when a layer is traced: a dynamic batch, for instance."""

MANY_ROWS = 2**16
"""Positions of an input of no particular size: so many that they alone decide."""

FOLDS_IN: tuple[Path, ...] = ("fold_in", "dense")
FOLDS_OUT: tuple[Path, ...] = ("fold_out", "dense")

_FLOAT_BYTES = 4
_LANES = 16
_DENSE_FAVOUR = 0.85
_WITH_LAYOUT = ("convolution", "pointwise")


class Rates(NamedTuple):
    """Seconds that one pass of one stage takes, per unit.

    Attributes:
        call: For the call itself.
        product: Per multiply-add. A convolution's outputs count in sixteens: few channels leave
            vector registers part empty and cost as much as sixteen.
        position: Per position of the output.
        byte: Per byte read or written.
    """

    call: float
    product: float
    position: float
    byte: float


RATES: dict[str, Rates] = {
    "spatial, forward": Rates(3.194e-05, 3.284e-11, 8.707e-09, 0.0),
    "fold, forward": Rates(5.105e-06, 3.214e-11, 1.263e-08, 0.0),
    "linear, forward": Rates(5.721e-06, 2.425e-11, 2.244e-08, 1.861e-11),
    "convolution, contiguous, forward": Rates(1.351e-05, 1.806e-11, 5.239e-09, 1.847e-10),
    "convolution, channels_last, forward": Rates(1.299e-05, 1.851e-11, 2.35e-08, 4.175e-11),
    "pointwise, contiguous, forward": Rates(7.192e-06, 2.125e-11, 3.699e-09, 8.645e-11),
    "pointwise, channels_last, forward": Rates(8.011e-06, 2.211e-11, 1.92e-09, 3.379e-11),
    "spatial, backward": Rates(4.43e-05, 2.48e-11, 2.995e-08, 0.0),
    "fold, backward": Rates(1.299e-05, 4.24e-11, 1.967e-08, 0.0),
    "linear, backward": Rates(1.568e-05, 2.789e-11, 1.348e-08, 2.28e-11),
    "convolution, contiguous, backward": Rates(3.096e-05, 2.59e-11, 1.587e-08, 1.522e-10),
    "convolution, channels_last, backward": Rates(3.104e-05, 2.487e-11, 1.631e-08, 3.617e-11),
    "pointwise, contiguous, backward": Rates(1.992e-05, 2.575e-11, 7.835e-09, 8.016e-11),
    "pointwise, channels_last, backward": Rates(2.452e-05, 2.538e-11, 1.523e-09, 3.637e-11),
}


class Stage(NamedTuple):
    """One convolution or matrix product.

    Attributes:
        kind: 'convolution', 'pointwise' (1x1), 'linear', or what folds factors into the core:
            'spatial' and 'fold'.
        rows_in: Positions, over the whole batch, that are read.
        rows_out: Positions that are written.
        inputs: Channels of a position read.
        outputs: Channels of a position written.
        taps: Size of the kernel.
        input_grad: Whether the backward pass goes on to the stage's input.
    """

    kind: Literal["convolution", "pointwise", "linear", "spatial", "fold"]
    rows_in: int
    rows_out: int
    inputs: int
    outputs: int
    taps: int = 1
    input_grad: bool = True


class LayerShape(NamedTuple):
    """All that the cost of a layer depends on.

    Attributes:
        weight: Shape (n_1, ..., n_d) of the weight.
        ranks: (r_1, ..., r_d).
        rows_in: Positions of the input over the whole batch.
        rows_out: Positions of the output.
        channels_last: Whether the input lies in memory with the channels last.
        input_grad: Whether training needs the gradient of the input; that of a network's first
            layer is not needed.
    """

    weight: tuple[int, ...]
    ranks: tuple[int, ...]
    rows_in: int
    rows_out: int
    channels_last: bool = False
    input_grad: bool = True


def linear_shape(
    weight: Sequence[int], ranks: Sequence[int], input: Sequence[int], input_grad: bool = True
) -> LayerShape:
    """What a linear layer costs depends on, for an input of shape (..., n_1)."""
    rows = math.prod(input[:-1])
    return LayerShape(tuple(weight), tuple(ranks), rows, rows, input_grad=input_grad)


def conv_shape(
    weight: Sequence[int],
    ranks: Sequence[int],
    input: Sequence[int],
    *,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | int | str = 0,
    dilation: Sequence[int] | int = 1,
    channels_last: bool = False,
    input_grad: bool = True,
) -> LayerShape:
    """What a convolution costs depends on, for an input of shape (batch, n_1, spatial...) or less.

    Args:
        weight: Shape of the weight, n_0 x n_1 x kernel.
        ranks: Ranks of the weight.
        input: Shape of the input, with the batch or without.
        stride: As in torch's convolutions.
        padding: As in torch's convolutions.
        dilation: As in torch's convolutions.
        channels_last: Whether the input lies in memory with the channels last.
        input_grad: Whether training needs the gradient of the input.
    """
    kernel = weight[2:]
    order = len(kernel)
    batch = math.prod(input[: -order - 1])
    strides, dilations = _per_dimension(stride, order), _per_dimension(dilation, order)
    spatial = input[-order:]
    if padding == "same":
        outputs = tuple(spatial)
    else:
        widths = _per_dimension(0 if isinstance(padding, str) else padding, order)
        outputs = tuple(
            max((size + 2 * pad - gap * (taps - 1) - 1) // step + 1, 0)
            for size, pad, gap, taps, step in zip(
                # An input of too few dimensions is refused where it is convolved.
                spatial,
                widths,
                dilations,
                kernel,
                strides,
                strict=False,
            )
        )
    return LayerShape(
        weight=tuple(weight),
        ranks=tuple(ranks),
        rows_in=batch * math.prod(spatial),
        rows_out=batch * math.prod(outputs),
        channels_last=channels_last,
        input_grad=input_grad,
    )


def path_stages(path: Path, shape: LayerShape) -> tuple[list[Stage], list[Stage]]:
    """The stages of a path: those that fold factors into the core, and those on the input.

    The folds depend on the weight alone and do not grow with the input.
    """
    outputs, inputs, *kernel = shape.weight
    r_out, r_in, *spatial_ranks = shape.ranks
    taps = math.prod(kernel)
    fold_in, fold_out = path in FOLDS_IN, path in FOLDS_OUT
    folds = []
    if kernel:
        folds.append(Stage("spatial", r_out * r_in, r_out * r_in, math.prod(spatial_ranks), taps))
    if fold_in:
        folds.append(Stage("fold", r_out * taps, r_out * taps, r_in, inputs))
    core_inputs = inputs if fold_in else r_in
    if fold_out:
        folds.append(Stage("fold", core_inputs * taps, core_inputs * taps, r_out, outputs))
    core_outputs = outputs if fold_out else r_out

    rows_in, rows_out, grad = shape.rows_in, shape.rows_out, shape.input_grad
    outer: Literal["pointwise", "linear"] = "pointwise" if kernel else "linear"
    middle: Literal["convolution", "pointwise", "linear"] = "convolution" if taps > 1 else outer
    passes = []
    if not fold_in:
        passes.append(Stage(outer, rows_in, rows_in, inputs, r_in, input_grad=grad))
        grad = True
    passes.append(Stage(middle, rows_in, rows_out, core_inputs, core_outputs, taps, grad))
    if not fold_out:
        passes.append(Stage(outer, rows_out, rows_out, r_out, outputs))
    return folds, passes


def stage_features(stage: Stage) -> Rates:
    """What one pass of a stage consists of, in the units of `Rates`."""
    rows_in, rows_out = float(stage.rows_in), float(stage.rows_out)
    outputs = stage.outputs
    if stage.kind in _WITH_LAYOUT:  # their kernels fill vector registers with output channels
        outputs = -(-outputs // _LANES) * _LANES
    products = rows_out * stage.inputs * outputs * stage.taps
    moved = rows_in * stage.inputs + rows_out * stage.outputs
    weight = stage.inputs * stage.outputs * stage.taps
    return Rates(1.0, products, rows_out, _FLOAT_BYTES * (moved + weight))


def stage_kind(stage: Stage, layout: str) -> str:
    """The kind of a stage by which `RATES` are kept; layouts make a difference to some."""
    return f"{stage.kind}, {layout}" if stage.kind in _WITH_LAYOUT else stage.kind


def path_macs(path: Path, shape: LayerShape) -> int:
    """Multiply-adds of one forward pass, without folding factors into the core."""
    return sum(
        stage.rows_out * stage.inputs * stage.outputs * stage.taps
        for stage in path_stages(path, shape)[1]
    )


def path_cost(path: Path, shape: LayerShape, mode: Mode) -> float:
    """Seconds that a path takes, by the model.

    Args:
        path: One of `PATHS`.
        shape: Of the layer and its input.
        mode: 'training' counts forward and backward passes, 'inference' the forward pass,
            'plain' the forward pass without the folding, which `to_plain` does once and for all.
    """
    folds, passes = path_stages(path, shape)
    return _cost(passes if mode == "plain" else folds + passes, shape, mode)


def dense_cost(shape: LayerShape, mode: Mode) -> float:
    """Seconds that the dense torch layer takes, by the model."""
    return _cost(path_stages("dense", shape)[1], shape, mode)


def _cost(stages: Sequence[Stage], shape: LayerShape, mode: Mode) -> float:
    layout = "channels_last" if shape.channels_last else "contiguous"
    total = 0.0
    for stage in stages:
        kind, features = stage_kind(stage, layout), stage_features(stage)
        total += _dot(RATES[f"{kind}, forward"], features)
        if mode == "training":
            total += (1 + stage.input_grad) * _dot(RATES[f"{kind}, backward"], features)
    return total


def choose_path(shape: LayerShape, mode: Mode) -> Path:
    """The cheapest path by the model, 'dense' unless another one is clearly cheaper.

    The model errs by ten to thirty per cent (see the result file), alike for similar stages. To
    take 'dense' by mistake costs little, and a layer is compared with the dense one.
    """
    costs = [
        path_cost(path, shape, mode) * (_DENSE_FAVOUR if path == "dense" else 1.0) for path in PATHS
    ]
    return PATHS[costs.index(min(costs))]  # what torch.compile reads, unlike min with a key


cached_path = lru_cache(maxsize=4096)(choose_path)
"""`choose_path`, remembered."""


def check_path(path: PathChoice) -> PathChoice:
    """Return a path by name.

    Raises:
        PathError: It is none.
    """
    if path != "auto" and path not in PATHS:
        raise PathError(
            f"path: got {path!r}, expected 'auto' or one of {', '.join(map(repr, PATHS))}; "
            "'auto' takes the cheapest"
        )
    return path


def _per_dimension(value: Sequence[int] | int, order: int) -> tuple[int, ...]:
    return (value,) * order if isinstance(value, int) else tuple(value)


def _dot(rates: Rates, features: Rates) -> float:
    return sum(rate * feature for rate, feature in zip(rates, features, strict=True))
