"""Fit the constants of the contraction planner (`tdlrt.planning.RATES`) to measurements.

    python benchmarks/calibrate_planner.py

Times single convolutions, matrix products and the folding of factors into the core, forward and
backward, on one thread; each is the least of several repetitions. The constants of each kind of
stage and pass are the non-negative ones with the least sum of squared relative errors. Writes
benchmarks/results/planner_calibration.json and prints the constants as they stand in the code.
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch import Tensor

from tdlrt.experiments.results import machine, versions
from tdlrt.functional import conv_stages
from tdlrt.planning import (
    FOLDS_IN,
    FOLDS_OUT,
    PATHS,
    LayerShape,
    Rates,
    Stage,
    path_stages,
    stage_features,
)
from tdlrt.planning import Path as TuckerPath

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/planner_calibration.json"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
IMAGES = [(1, 32), (1, 8), (1, 2), (8, 16), (64, 32), (64, 8), (64, 2), (256, 4)]
CHANNELS = [
    (1, 10),
    (1, 20),
    (3, 64),
    (6, 6),
    (16, 64),
    (64, 16),
    (51, 51),
    (64, 64),
    (200, 51),
    (256, 256),
]
WIDE = [(51, 512), (512, 51), (512, 512)]
ROWS = [1, 16, 64, 256, 2048]
WIDTHS = [10, 50, 200, 512, 2048]
LARGEST = 4e9  # multiply-adds; larger ones say nothing new
SIGNIFICANT = 4

GROUPS = [("spatial", "fold"), ("linear",)]
GROUPS += [(f"{kind}, {layout}",) for kind in ("convolution", "pointwise") for layout in LAYOUTS]

NOTHING = Rates(0.0, 0.0, 0.0, 0.0)
Constants = dict[str, dict[str, float]]
Features = dict[str, Rates]  # by kind of stage
Sample = tuple[str, Features, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.1, help="for each measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    samples = list(measurements(arguments.seconds))
    rates, errors = {}, {}
    for pass_ in ("forward", "backward"):
        for kinds in GROUPS:
            group = [one for one in samples if one[0] == pass_ and not one[1].keys() - {*kinds}]
            constants, error = fit(kinds, group, pass_)
            rates |= constants
            errors |= dict.fromkeys(constants, error)
    for name, constants in rates.items():
        print(f'    "{name}": Rates({", ".join(map(repr, constants.values()))}),')
    print(errors)
    result = {
        "command": "python benchmarks/calibrate_planner.py",
        "versions": versions(),
        "machine": machine(torch.device("cpu")),
        "rates": rates,
        "median_relative_error": errors,
        "samples": [
            {"pass": name, "stages": stages, "seconds": float(f"{seconds:.4g}")}
            for name, stages, seconds in samples
        ],
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def fit(kinds: Sequence[str], samples: list[Sample], pass_: str) -> tuple[Constants, float]:
    """Constants of one pass of some kinds, and the median relative error of the prediction."""
    seconds = np.array([sample[2] for sample in samples])
    features = np.array(
        [np.concatenate([stages.get(kind, NOTHING) for kind in kinds]) for _, stages, _ in samples]
    )
    relative = features / seconds[:, None]
    scale = np.linalg.norm(relative, axis=0)
    constants = nnls(relative / scale, np.ones(len(samples)))[0] / scale
    rounded = [float(f"{constant:.{SIGNIFICANT}g}") for constant in constants]
    error = float(np.median(np.abs(relative @ rounded - 1)))
    rows = np.reshape(rounded, (len(kinds), -1)).tolist()
    named = [dict(zip(Rates._fields, row, strict=True)) for row in rows]
    return {f"{kind}, {pass_}": row for kind, row in zip(kinds, named, strict=True)}, round(
        error, 3
    )


def measurements(seconds: float) -> Iterator[Sample]:
    cases = [*convolutions(), *products(), *folds()]
    random.Random(0).shuffle(cases)  # so that a busy minute of the machine hits all kinds alike
    for number, (features, build) in enumerate(cases):
        yield from timed(features, *build(), seconds)
        if number % 50 == 0:
            print(f"{number} of {len(cases)}", flush=True)


Forward = Callable[[], Tensor]
Case = tuple[Features, Callable[[], tuple[Forward, list[Tensor]]]]


def convolutions() -> Iterator[Case]:
    for (batch, size), (inputs, outputs), kernel in itertools.product(
        IMAGES, CHANNELS + WIDE, (1, 3, 5)
    ):
        rows = batch * size**2
        products = rows * inputs * outputs * kernel**2
        if products > LARGEST or (512 in (inputs, outputs) and (size > 8 or kernel == 5)):
            continue
        kind: Any = "pointwise" if kernel == 1 else "convolution"
        features = stage_features(Stage(kind, rows, rows, inputs, outputs, kernel**2))
        for layout, with_input in itertools.product(LAYOUTS, (False, True)):
            shapes = (batch, inputs, size, size), (outputs, inputs, kernel, kernel)
            build = partial(build_convolution, *shapes, layout, with_input)
            yield {f"{kind}, {layout}": features}, build


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
        features = stage_features(Stage("linear", rows, rows, inputs, outputs))
        yield {"linear": features}, partial(build_product, rows, inputs, outputs)


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
        features = {}
        for stage in stages:
            so_far = features.get(stage.kind, NOTHING)
            features[stage.kind] = Rates(*map(sum, zip(so_far, stage_features(stage), strict=True)))
        if sum(rates.product for rates in features.values()) <= LARGEST / 2:
            yield features, partial(build_folds, shape, ranks, path, layout)


def build_folds(
    shape: tuple[int, ...], ranks: tuple[int, ...], path: TuckerPath, layout: str
) -> tuple[Forward, list[Tensor]]:
    core = torch.randn(ranks).requires_grad_()
    factors = [torch.randn(n, r).requires_grad_() for n, r in zip(shape, ranks, strict=True)]
    folded = [core, *factors[2:]]
    folded += [factors[1]] if path in FOLDS_IN else []
    folded += [factors[0]] if path in FOLDS_OUT else []
    last = layout == "channels_last"
    return lambda: conv_stages(core, factors, path, channels_last=last)[1], folded


def timed(
    features: Features, forward: Forward, leaves: list[Tensor], seconds: float
) -> Iterator[Sample]:
    """Least time of the forward and of the backward pass."""
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
    yield "forward", features, best["forward"]
    scaled = {kind: Rates(*(gradients * x for x in one)) for kind, one in features.items()}
    yield "backward", scaled, backward


if __name__ == "__main__":
    main()
