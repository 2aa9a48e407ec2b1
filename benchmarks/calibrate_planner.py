"""Fit the constants of the contraction planner (`tdlrt.paths.cost.RATES`) to measurements.

    python benchmarks/calibrate_planner.py

Times single convolutions, matrix products and the folding of factors into the core, forward and
backward, on one thread; each is the least of several repetitions. The constants of each kind of
stage and pass are fitted to the relative errors. Writes benchmarks/results/planner_calibration.json
and prints the constants as they stand in the code.
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch import Tensor

from tdlrt.paths import PATHS, LayerShape, PathName
from tdlrt.paths.apply import conv_stages
from tdlrt.paths.cost import Rates, stage_features, stage_kind
from tdlrt.paths.stages import FOLDS_IN, FOLDS_OUT, Stage, path_stages
from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.files import write_text

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/planner_calibration.json"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
IMAGES = [(1, 32), (1, 8), (1, 2), (8, 16), (64, 32), (64, 8), (64, 2), (256, 4)]
CHANNELS = [(1, 2), (1, 10), (1, 20), (2, 20), (3, 64), (6, 6), (13, 13), (16, 64), (64, 16)]
CHANNELS += [(40, 24), (51, 51), (64, 64), (102, 102), (200, 51), (256, 256)]
WIDE = [(51, 512), (512, 51), (512, 512)]
ROWS = [1, 16, 64, 256, 2048]
WIDTHS = [10, 50, 200, 512, 2048]
LARGEST = 4e9  # multiply-adds; larger ones say nothing new
SIGNIFICANT = 4
ROUNDS = 15
SHORTEST = 1e-9  # seconds
TOLERANCE = 0.03  # relative errors below this count alike

# Kinds of stages that are fitted together.
GROUPS = [("spatial", "fold"), ("linear",)]
GROUPS += [(f"{kind}, {layout}",) for kind in ("convolution", "pointwise") for layout in LAYOUTS]

Constants = dict[str, dict[str, float]]
Forward = Callable[[], Tensor]


class Case(NamedTuple):
    """Something to time: the stages it consists of, and how to make it."""

    stages: list[Stage]
    layout: str
    build: Callable[[], tuple[Forward, list[Tensor]]]


class Sample(NamedTuple):
    """What was measured: the gradients computed (0 in a forward pass) and the seconds."""

    stages: list[Stage]
    layout: str
    gradients: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.1, help="for each measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    samples = list(measurements(arguments.seconds))
    rates, errors = fit(samples)
    result = {
        **made_by("python benchmarks/calibrate_planner.py"),
        "rates": rates,
        "median_relative_error": errors,
        "samples": [
            [sample.stages, sample.layout, sample.gradients, float(f"{sample.seconds:.4g}")]
            for sample in samples
        ],
    }
    write_text(RESULT, json.dumps(result) + "\n")
    for name, constants in rates.items():
        print(f'    "{name}": Rates({", ".join(map(repr, constants.values()))}),')
    print(errors)


def fit(samples: Sequence[Sample]) -> tuple[Constants, dict[str, float]]:
    """Constants of every kind of stage and pass, and the median relative errors."""
    rates: Constants = {}
    errors: dict[str, float] = {}
    for pass_, kinds in itertools.product(("forward", "backward"), GROUPS):
        group = [
            sample
            for sample in samples
            if (sample.gradients > 0) == (pass_ == "backward")
            and stage_kind(sample.stages[0], sample.layout) in kinds
        ]
        matrix = np.array([features(sample, kinds) for sample in group])
        constants = robust_fit(matrix, np.array([sample.seconds for sample in group]))
        rounded = np.array([float(f"{constant:.{SIGNIFICANT}g}") for constant in constants])
        error = np.median(
            [abs(p / s.seconds - 1) for p, s in zip(matrix @ rounded, group, strict=True)]
        )
        for kind, row in zip(kinds, rounded.reshape(len(kinds), -1).tolist(), strict=True):
            rates[f"{kind}, {pass_}"] = dict(zip(Rates._fields, row, strict=True))
            errors[f"{kind}, {pass_}"] = round(float(error), 3)
    return rates, errors


def robust_fit(matrix: np.ndarray[Any, Any], seconds: np.ndarray[Any, Any]) -> Any:
    """Non-negative constants with the least sum of absolute relative errors, nearly.

    Least squares with weights that follow the errors: what was measured while the machine was
    busy with something else counts little. Errors are relative to the geometric mean of measured
    and predicted time, so that twice too much and half too little weigh the same.
    """
    scale, weight = seconds.copy(), np.ones(len(seconds))
    for _ in range(ROUNDS):
        weighted = matrix / scale[:, None] * weight[:, None]
        norms = np.linalg.norm(weighted, axis=0)
        constants = nnls(weighted / norms, seconds / scale * weight)[0] / norms
        predicted = np.maximum(matrix @ constants, SHORTEST)
        scale = np.sqrt(seconds * predicted)
        weight = np.abs((predicted - seconds) / scale).clip(TOLERANCE) ** -0.5
    return constants


def features(sample: Sample, kinds: Sequence[str]) -> np.ndarray[Any, Any]:
    """What a sample consists of, in the units of the rates of each kind, one after the other."""
    rows = np.zeros((len(kinds), len(Rates._fields)))
    for stage in sample.stages:
        number = kinds.index(stage_kind(stage, sample.layout))
        rows[number] += max(sample.gradients, 1) * np.array(stage_features(stage))
    return rows.flatten()


def measurements(seconds: float) -> Iterator[Sample]:
    cases = [*convolutions(), *products(), *folds()]
    random.Random(0).shuffle(cases)  # so that a busy minute of the machine hits all kinds alike
    for number, case in enumerate(cases):
        yield from timed(case, seconds)
        if number % 50 == 0:
            print(f"{number} of {len(cases)}", flush=True)


def convolutions() -> Iterator[Case]:
    for (batch, size), (inputs, outputs), kernel in itertools.product(
        IMAGES, CHANNELS + WIDE, (1, 3, 5)
    ):
        rows = batch * size**2
        products = rows * inputs * outputs * kernel**2
        if products > LARGEST or (512 in (inputs, outputs) and (size > 8 or kernel == 5)):
            continue
        kind: Any = "pointwise" if kernel == 1 else "convolution"
        stage = Stage(kind, rows, rows, inputs, outputs, kernel**2)
        for layout, with_input in itertools.product(LAYOUTS, (False, True)):
            shapes = (batch, inputs, size, size), (outputs, inputs, kernel, kernel)
            build = partial(build_convolution, *shapes, layout, with_input)
            yield Case([stage], layout, build)


def build_convolution(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], layout: str, with_input: bool
) -> tuple[Forward, list[Tensor]]:
    x = torch.randn(x_shape).to(memory_format=LAYOUTS[layout]).requires_grad_()
    w = (0.01 * torch.randn(w_shape)).to(memory_format=LAYOUTS[layout]).requires_grad_()
    padding = w_shape[-1] // 2
    return partial(F.conv2d, x, w, None, 1, padding), [w, x] if with_input else [w]


def products() -> Iterator[Case]:
    for rows, inputs, outputs in itertools.product(ROWS, WIDTHS, WIDTHS):
        if rows * inputs * outputs > LARGEST:
            continue
        stage = Stage("linear", rows, rows, inputs, outputs)
        yield Case([stage], "contiguous", partial(build_product, rows, inputs, outputs))


def build_product(rows: int, inputs: int, outputs: int) -> tuple[Forward, list[Tensor]]:
    x = torch.randn(rows, inputs).requires_grad_()
    w = torch.randn(outputs, inputs).requires_grad_()
    return partial(F.linear, x, w), [w, x]


def folds() -> Iterator[Case]:
    for (outputs, inputs), share, kernel, path, layout in itertools.product(
        [(20, 1), (50, 20), (64, 64), (256, 128), (256, 256), (512, 512)],
        (0.1, 0.2, 0.5, 0.9),
        (3, 5),
        PATHS,
        LAYOUTS,
    ):
        shape = (outputs, inputs, kernel, kernel)
        ranks = (*(max(round(share * n), 1) for n in shape[:2]), kernel, kernel)
        stages, _ = path_stages(path, LayerShape(shape, ranks, 1, 1))
        if sum(stage_features(stage).product for stage in stages) <= LARGEST / 2:
            yield Case(stages, layout, partial(build_folds, shape, ranks, path, layout))


def build_folds(
    shape: tuple[int, ...], ranks: tuple[int, ...], path: PathName, layout: str
) -> tuple[Forward, list[Tensor]]:
    core = torch.randn(ranks).requires_grad_()
    factors = [torch.randn(n, r).requires_grad_() for n, r in zip(shape, ranks, strict=True)]
    folded = [core, *factors[2:]]
    folded += [factors[1]] if path in FOLDS_IN else []
    folded += [factors[0]] if path in FOLDS_OUT else []
    last = layout == "channels_last"
    return lambda: conv_stages(core, factors, path, channels_last=last)[1], folded


def timed(case: Case, seconds: float) -> Iterator[Sample]:
    """Least time of the forward and of the backward pass."""
    forward, leaves = case.build()
    gradient = torch.randn_like(forward())
    best = {"forward": float("inf"), "both": float("inf")}
    end = time.perf_counter() + seconds
    for repetition in itertools.count():
        start = time.perf_counter()
        with torch.no_grad():
            forward()
        middle = time.perf_counter()
        torch.autograd.grad(forward(), leaves, gradient)
        stop = time.perf_counter()
        if repetition:  # the first one warms up
            best["forward"] = min(best["forward"], middle - start)
            best["both"] = min(best["both"], stop - middle)
        if repetition >= 3 and stop > end:
            break
    gradients = 1 if len(leaves) == 1 else 2  # with a fold every stage has two
    backward = max(best["both"] - best["forward"], 0.1 * best["forward"])
    yield Sample(case.stages, case.layout, 0, best["forward"])
    yield Sample(case.stages, case.layout, gradients, backward)


if __name__ == "__main__":
    main()
