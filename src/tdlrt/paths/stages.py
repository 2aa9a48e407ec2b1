"""The forward paths of a Tucker layer and the stages that each path consists of.

A *path* is an order in which W = C x_1 U_1 ... x_d U_d is applied to an input x. Its *stages* are
small convolutions or matrix products. To *fold* a factor is to multiply it into the core C before
the input is looked at, so that there is one stage less.

    three_stage   U_in^T, then C, then U_out
    fold_in       C U_in^T, then U_out
    fold_out      U_in^T, then U_out C
    dense         U_out C U_in^T in one stage

The spatial factors of a convolution are folded in every path. A linear layer whose weight is a
tensor of rows times columns has several U_in and U_out. Each is a stage of its own, on one mode of
the input or of the output, and the core between them is the matrix prod r_out x prod r_in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from tdlrt.errors import PathError

__all__ = [
    "FOLDS_IN",
    "FOLDS_OUT",
    "MANY_ROWS",
    "PATHS",
    "LayerShape",
    "ModeShape",
    "PathChoice",
    "PathName",
    "Stage",
    "check_path",
    "conv_shape",
    "expanding_modes",
    "has_plain_form",
    "linear_shape",
    "path_macs",
    "path_parameters",
    "path_stages",
    "reducing_modes",
]

PathName: TypeAlias = Literal["three_stage", "fold_in", "fold_out", "dense"]
PathChoice: TypeAlias = PathName | Literal["auto"]

PATHS: tuple[PathName, ...] = ("three_stage", "fold_in", "fold_out", "dense")
FOLDS_IN: tuple[PathName, ...] = ("fold_in", "dense")
FOLDS_OUT: tuple[PathName, ...] = ("fold_out", "dense")

MANY_ROWS = 2**16
"""Positions assumed for an input of unknown size: so many that the cost of a call is negligible."""


class Stage(NamedTuple):
    """One convolution or matrix product.

    Attributes:
        kind: 'convolution', 'pointwise' (1x1) or 'linear' for a stage on the input; 'spatial' or
            'fold' for a product that folds factors into the core.
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
    """Everything that the cost of a layer depends on.

    Attributes:
        weight: Shape (n_1, ..., n_d) of the weight.
        ranks: (r_1, ..., r_d).
        rows_in: Positions of the input over the whole batch.
        rows_out: Positions of the output.
        channels_last: Whether the input lies in memory with the channels last.
        input_grad: Whether training needs the gradient of the input, which it does not in the first
            layer of a network.
        row_modes: How many modes of a linear layer's weight index its outputs; 0 for a convolution.
        is_batch: Whether the input has at most one dimension before its features or channels.
    """

    weight: tuple[int, ...]
    ranks: tuple[int, ...]
    rows_in: int = MANY_ROWS
    rows_out: int = MANY_ROWS
    channels_last: bool = False
    input_grad: bool = True
    row_modes: int = 0
    is_batch: bool = True


def linear_shape(
    weight: Sequence[int],
    ranks: Sequence[int],
    input: Sequence[int],
    input_grad: bool = True,
    row_modes: int = 1,
) -> LayerShape:
    """The `LayerShape` of a linear layer for an input of shape (..., features)."""
    rows = math.prod(input[:-1])
    return LayerShape(
        weight=tuple(weight),
        ranks=tuple(ranks),
        rows_in=rows,
        rows_out=rows,
        input_grad=input_grad,
        row_modes=row_modes,
        is_batch=len(input) <= 2,
    )


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
    """The `LayerShape` of a convolution for an input of shape (batch, n_1, spatial...).

    Args:
        weight: Shape of the weight, n_0 x n_1 x kernel.
        ranks: Ranks of the weight.
        input: Shape of the input, with or without the batch.
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
                # The convolution itself refuses an input with too few dimensions.
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


def path_stages(path: PathName, shape: LayerShape) -> tuple[list[Stage], list[Stage]]:
    """The stages of a path: first those that fold factors into the core, then those on the input.

    The stages that fold depend on the weight alone and do not grow with the input.
    """
    if shape.row_modes:
        return _linear_stages(path, shape)
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


class ModeShape(NamedTuple):
    """One mode of a tensor before x size x after, which a matrix maps to before x result x after.

    Attributes:
        mode: The mode, counted from 0.
        before: Product of the sizes of the modes before it.
        after: Product of the sizes of the modes after it.
        size: Size of the mode.
        result: Size of the mode in the result.
    """

    mode: int
    before: int
    after: int
    size: int
    result: int


def reducing_modes(sizes: Sequence[int], ranks: Sequence[int]) -> Iterator[ModeShape]:
    """The modes of a tensor in the order in which bases reduce them, the first mode first.

    >>> [(one.before, one.after) for one in reducing_modes((50, 4, 4), (9, 3, 2))]
    [(1, 16), (9, 4), (27, 1)]
    """
    for mode, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
        yield ModeShape(mode, math.prod(ranks[:mode]), math.prod(sizes[mode + 1 :]), size, rank)


def expanding_modes(sizes: Sequence[int], ranks: Sequence[int]) -> Iterator[ModeShape]:
    """The modes of a core in the order in which bases expand them, the last mode first."""
    for one in reversed(list(reducing_modes(sizes, ranks))):
        yield one._replace(size=one.result, result=one.size)


def _linear_stages(path: PathName, shape: LayerShape) -> tuple[list[Stage], list[Stage]]:
    """`path_stages` of a linear layer, whose weight has one or several modes of rows and columns.

    Where several modes follow the one that a stage acts on, its cost is taken for that of a 1x1
    convolution.
    """
    rows, columns = shape.weight[: shape.row_modes], shape.weight[shape.row_modes :]
    r_rows, r_columns = shape.ranks[: shape.row_modes], shape.ranks[shape.row_modes :]
    fold_in, fold_out = path in FOLDS_IN, path in FOLDS_OUT
    core_inputs, core_outputs = math.prod(r_columns), math.prod(r_rows)
    folds = []

    def fold(one: ModeShape, others: int) -> Stage:
        positions = others * one.before * one.after
        return Stage("fold", positions, positions, one.size, one.result)

    if fold_in:
        folds += [fold(one, core_outputs) for one in expanding_modes(columns, r_columns)]
        core_inputs = math.prod(columns)
    if fold_out:
        folds += [fold(one, core_inputs) for one in expanding_modes(rows, r_rows)]
        core_outputs = math.prod(rows)

    def stage(one: ModeShape) -> Stage:
        positions = shape.rows_in * one.before * one.after
        kind: Literal["pointwise", "linear"] = "linear" if one.after == 1 else "pointwise"
        return Stage(kind, positions, positions, one.size, one.result)

    core = Stage("linear", shape.rows_in, shape.rows_out, core_inputs, core_outputs)
    passes = [] if fold_in else [stage(one) for one in reducing_modes(columns, r_columns)]
    passes.append(core)
    passes += [] if fold_out else [stage(one) for one in expanding_modes(rows, r_rows)]
    passes[0] = passes[0]._replace(input_grad=shape.input_grad)
    return folds, passes


def has_plain_form(path: PathName, shape: LayerShape) -> bool:
    """Whether torch has layers for the stages of a path on an input of this shape.

    A layer that maps a mode which others follow needs an input with one batch dimension.
    """
    stages = path_stages(path, shape)[1] if shape.row_modes else []
    return shape.is_batch or all(stage.kind == "linear" for stage in stages)


def path_macs(path: PathName, shape: LayerShape) -> int:
    """Multiply-adds of one forward pass; those that fold factors into the core are not counted."""
    return sum(
        stage.rows_out * stage.inputs * stage.outputs * stage.taps
        for stage in path_stages(path, shape)[1]
    )


def path_parameters(path: PathName, shape: LayerShape) -> int:
    """Number of parameters of the stages on the input, which plain torch layers store."""
    return sum(stage.inputs * stage.outputs * stage.taps for stage in path_stages(path, shape)[1])


def check_path(path: PathChoice) -> PathChoice:
    """Return the choice of a path unchanged if it is valid.

    Raises:
        PathError: It is neither 'auto' nor one of `PATHS`.
    """
    if path != "auto" and path not in PATHS:
        raise PathError(
            f"path: got {path!r}, expected 'auto' or one of {', '.join(map(repr, PATHS))}; "
            "'auto' chooses the cheapest path"
        )
    return path


def _per_dimension(value: Sequence[int] | int, order: int) -> tuple[int, ...]:
    return (value,) * order if isinstance(value, int) else tuple(value)
