"""The cost of a forward path: the seconds that its stages are expected to take.

    cost(path) = sum over stages and passes of
                 call + product * MACs + position * positions + byte * bytes,

where the passes are the forward pass and, in training, the backward pass, and the constants are
those of `RATES`. `benchmarks/calibrate_planner.py` fitted the constants to measurements. Only
their ratios matter, because a cost is always compared with that of another path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from tdlrt.paths.stages import LayerShape, PathName, Stage, path_stages

__all__ = [
    "RATES",
    "Purpose",
    "Rates",
    "dense_cost",
    "path_cost",
    "stage_features",
    "stage_kind",
]

Purpose: TypeAlias = Literal["training", "inference", "plain"]
"""What a path is chosen for: training, inference, or inference of the plain torch layers that a
Tucker layer is converted to, which fold factors once and not in every forward pass."""

_FLOAT_BYTES = 4
_LANES = 16
_WITH_LAYOUT = ("convolution", "pointwise")


class Rates(NamedTuple):
    """Seconds that one pass of one stage takes, per unit.

    Attributes:
        call: For the call itself.
        product: Per multiply-add. Output channels of a convolution are rounded up to a multiple of
            16, because they fill vector registers and a partly filled register costs as much.
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


def stage_features(stage: Stage) -> Rates:
    """The number of units of each of the `Rates` in one pass of a stage."""
    rows_in, rows_out = float(stage.rows_in), float(stage.rows_out)
    outputs = stage.outputs
    if stage.kind in _WITH_LAYOUT:  # see `Rates.product`
        outputs = -(-outputs // _LANES) * _LANES
    products = rows_out * stage.inputs * outputs * stage.taps
    moved = rows_in * stage.inputs + rows_out * stage.outputs
    weight = stage.inputs * stage.outputs * stage.taps
    return Rates(1.0, products, rows_out, _FLOAT_BYTES * (moved + weight))


def stage_kind(stage: Stage, layout: str) -> str:
    """The key of a stage in `RATES`, which includes the memory layout for some kinds."""
    return f"{stage.kind}, {layout}" if stage.kind in _WITH_LAYOUT else stage.kind


def path_cost(path: PathName, shape: LayerShape, purpose: Purpose) -> float:
    """Seconds that one call of a layer along a path is expected to take.

    Args:
        path: One of `PATHS`.
        shape: Shape of the layer and of its input.
        purpose: 'training' counts the forward and the backward pass, 'inference' the forward
            pass, 'plain' the forward pass without the stages that fold.
    """
    folds, passes = path_stages(path, shape)
    return _cost(passes if purpose == "plain" else folds + passes, shape, purpose)


def dense_cost(shape: LayerShape, purpose: Purpose) -> float:
    """Seconds that one call of the dense torch layer is expected to take."""
    return _cost(path_stages("dense", shape)[1], shape, purpose)


def _cost(stages: Sequence[Stage], shape: LayerShape, purpose: Purpose) -> float:
    layout = "channels_last" if shape.channels_last else "contiguous"
    total = 0.0
    for stage in stages:
        kind, features = stage_kind(stage, layout), stage_features(stage)
        total += _dot(RATES[f"{kind}, forward"], features)
        if purpose == "training":
            total += (1 + stage.input_grad) * _dot(RATES[f"{kind}, backward"], features)
    return total


def _dot(rates: Rates, features: Rates) -> float:
    return sum(rate * feature for rate, feature in zip(rates, features, strict=True))
