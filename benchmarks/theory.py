"""What the theory promises, measured on small problems in float64: see docs/theory.md.

    python benchmarks/theory.py

Writes benchmarks/results/theory.json, the figures docs/figures/theory_*.svg and the tables between
the markers of docs/theory.md. With --draw the figures and tables are made from the result file
that is there. tests/test_theory.py checks the claims on the functions of this script.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import tdlrt
from tdlrt.linalg import Layout, TangentSpace, mode_product, multi_mode_product, unfold
from tdlrt.nn import TuckerConv2d, TuckerLayer, TuckerLinear
from tdlrt_lab.run.environment import made_by
from tdlrt_lab.run.files import write_text

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/theory.json"
PAGE = ROOT / "docs/theory.md"
FIGURES = ROOT / "docs/figures"

SEED = 0
SHAPES = {"linear": (20, 16), "conv2d": (9, 8, 7, 6)}
RANK = 4
SIGMAS = (1e-1, 1e-2, 1e-4, 1e-6, 1e-8)
STEPS = (4, 8, 16, 32, 64, 128)
TAUS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 2e-1)
DESCENT_TAUS = (0.0, 0.01, 0.1)
INTEGRATORS = ("parallel", "bug")
METHODS = (*INTEGRATORS, "factor flow", "factor descent")
FITTERS = ("dense", *INTEGRATORS, "factor descent")
PATHS = ("all modes", "one mode")
TITLES = {
    "parallel": "TDLRT, parallel",
    "bug": "TDLRT, bug",
    "factor flow": "Euler on the flow of the factors",
    "factor descent": "gradient descent on the factors",
    "dense": "dense gradient descent",
    "linear": "linear layer, d = 2",
    "conv2d": "2-d convolution, d = 4",
}
COLOURS = {
    "parallel": "#0072b2",
    "bug": "#d55e00",
    "factor flow": "#009e73",
    "factor descent": "#cc79a7",
    "dense": "#555555",
}
STALL_LR, STALL_FRACTION, STALL_LIMIT = 0.1, 0.01, 2000

Loss = Callable[[Tensor], Tensor]
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="only draw, from the result file")
    if not parser.parse_args().draw:
        write_text(RESULT, to_json(measure()))
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    draw(result)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")


def measure() -> dict[str, Any]:
    """All measurements."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        **made_by("python benchmarks/theory.py", "matplotlib"),
        "seed": SEED,
    }
    result["error"] = [
        {"kind": kind, "method": method, "sigma": sigma, "steps": steps}
        | {"error": rounded(final_error(kind, sigma, steps, method))}
        for kind in SHAPES
        for method in METHODS
        for sigma in SIGMAS
        for steps in STEPS
    ]
    result["stall"] = [
        {"kind": kind, "method": method, "sigma": sigma, "steps": fit_steps(kind, sigma, method)}
        for kind in SHAPES
        for method in FITTERS
        for sigma in SIGMAS
    ]
    result["descent"] = [
        {"kind": kind, "integrator": integrator, "tau": tau}
        | descent_row(*descent(kind, integrator, tau))
        for kind in SHAPES
        for integrator in INTEGRATORS
        for tau in DESCENT_TAUS
    ]
    result["distance"] = [
        {"kind": kind, "integrator": integrator, "tau": tau}
        | {name: rounded(value) for name, value in distance(kind, integrator, tau).items()}
        for kind in SHAPES
        for integrator in INTEGRATORS
        for tau in TAUS
    ]
    result["reproduction"] = [
        {"kind": kind, "integrator": integrator, "path": path, "sigma": sigma}
        | {"error": rounded(max(reproduction_errors(kind, path, integrator, sigma)))}
        for kind in SHAPES
        for integrator in INTEGRATORS
        for path in PATHS
        for sigma in SIGMAS
    ]
    return result


def to_json(result: dict[str, Any]) -> str:
    """One line for each row."""
    entries = []
    for key, value in result.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        entries.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def descent_row(measured: list[float], guaranteed: list[float]) -> Row:
    return {
        "margin": rounded(min(a - b for a, b in zip(measured, guaranteed, strict=True))),
        "measured": [rounded(value) for value in measured],
        "guaranteed": [rounded(value) for value in guaranteed],
    }


def rounded(value: float) -> float:
    """Six significant digits: what a reader may compare between machines, and no more."""
    return float(f"{value:.6g}")


# Layers, losses and optimisers


def tucker_layer(weight: Tensor, rank: int | str) -> TuckerLayer:
    """A layer that starts at (the truncation of) a weight."""
    dense: nn.Module
    if weight.ndim == 2:
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        make: Callable[..., TuckerLayer] = TuckerLinear.from_linear
    else:
        out, inputs, height, width = weight.shape
        dense = nn.Conv2d(inputs, out, (height, width), bias=False, dtype=weight.dtype)
        make = TuckerConv2d.from_conv
    dense.weight = nn.Parameter(weight.clone())
    return make(dense, rank=rank)


def weight_of(layer: TuckerLayer) -> Tensor:
    return layer.dense_weight().detach()


def closure_of(layer: TuckerLayer, loss: Loss) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        layer.zero_grad()
        value = loss(layer.dense_weight())
        torch.autograd.backward(value)
        return value

    return closure


def optimizer_of(layer: TuckerLayer, method: str, lr: float, tau: float | None = None) -> Any:
    """TDLRT at a tolerance, or at the ranks there are, or one of the two baselines."""
    if method == "factor descent":
        return torch.optim.SGD(layer.parameters(), lr=lr)
    if method == "factor flow":
        return FactorFlow(layer, lr)
    policy = tdlrt.FixedRank() if tau is None else tdlrt.RelativeTolerance(tau)
    return tdlrt.TDLRT(layer, torch.optim.SGD, lr=lr, rank_policy=policy, integrator=method)


class FactorFlow:
    """Explicit Euler on the flow of the factors that the projected gradient flow implies.

    C' = -grad_C L,  U_i' = -(I - U_i U_i^T) Mat_i(grad_W L) (kron_{j != i} U_j) Mat_i(C)^+. The
    new bases are made orthonormal by a QR factorisation whose R goes into the core, which leaves
    the weight as it is.

    Args:
        layer: The layer to move.
        lr: Step size.
    """

    def __init__(self, layer: TuckerLayer, lr: float) -> None:
        self.layer, self.lr = layer, lr

    def step(self, closure: Callable[[], Tensor]) -> None:
        """One step; the closure computes the gradients."""
        closure()
        core, bases = self.layer.core.detach(), [u.detach() for u in self.layer.factors]
        moved = core - self.lr * gradient_of(self.layer.core)
        for mode, basis in enumerate(bases):
            gradient = gradient_of(self.layer.factors[mode])
            # grad_{U_i} L = G_i S_i^T, and G_i S_i^-1 is the term with Mat_i(C)^+.
            s = torch.linalg.qr(unfold(core, mode).mT)[1].mT
            outside = gradient - basis @ (basis.mT @ gradient)
            part = torch.linalg.solve_triangular(s.mT, outside, upper=True, left=False)
            velocity = torch.linalg.solve_triangular(s, part, upper=False, left=False)
            bases[mode], triangle = torch.linalg.qr(basis - self.lr * velocity)
            moved = mode_product(moved, triangle, mode)
        self.layer.resize_(moved, bases)


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None  # noqa: S101
    return parameter.grad


# Random pieces


def random_basis(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    gaussian = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(gaussian)[0]
    return basis


def random_rotation_rate(size: int, generator: torch.Generator) -> Tensor:
    """A skew-symmetric matrix of spectral norm 1."""
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    skew = gaussian - gaussian.mT
    rate: Tensor = skew / torch.linalg.matrix_norm(skew, 2)
    return rate


def decaying_tensor(shape: Sequence[int], seed: int) -> Tensor:
    """A Gaussian core with entries that decay by 1e-5 along every mode, in random bases, norm 1."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(*shape, generator=generator, dtype=torch.float64)
    for mode, size in enumerate(shape):
        tensor = mode_product(tensor, torch.logspace(0, -5, size).double().diag(), mode)
    bases = [random_basis(size, size, generator) for size in shape]
    tensor = multi_mode_product(tensor, bases)
    result: Tensor = tensor / tensor.norm()
    return result


# (a) Small singular values


class Curve:
    """A smooth curve X(t) of multilinear rank (4, ..., 4) with a small singular value at t = 0.

    X(t) = sum_{k < 4} c_k(t) u_k (x) v_k (x) ... + (sigma u_4 + t u_5) (x) v_4 (x) ..., c_k > 0,
    with every mode turning at a speed of 1. At t = 0 the smallest singular value of all unfoldings
    is sigma, and the direction u_4 that belongs to it turns to u_5 within a time of sigma, while X'
    and X'' stay bounded whatever sigma is.

    Args:
        kind: Which shape.
        sigma: The singular value.
    """

    def __init__(self, kind: str, sigma: float) -> None:
        generator = torch.Generator().manual_seed(SEED)
        shape = SHAPES[kind]
        self.bases = [random_basis(size, RANK + 1, generator) for size in shape]
        self.rates = [random_rotation_rate(size, generator) for size in shape]
        self.small = torch.zeros([RANK + 1] * len(shape), dtype=torch.float64)
        self.small[(RANK - 1,) * len(shape)] = sigma

    def layer(self) -> TuckerLayer:
        """A layer at X(0), exact in core and bases whatever sigma is."""
        layer = tucker_layer(self.value(0.0), RANK)
        core = self._core(0.0)[tuple([slice(RANK)] * self.small.ndim)]
        layer.resize_(core, [basis[:, :RANK] for basis in self.bases])
        return layer

    def value(self, time: float) -> Tensor:
        """X(t)."""
        return multi_mode_product(self._core(time), self._turned(time))

    def derivative(self, time: float) -> Tensor:
        """X'(t)."""
        order, turned = self.small.ndim, self._turned(time)
        velocity = torch.zeros_like(self.small)
        for k in range(RANK - 1):
            velocity[(k,) * order] = 0.5 ** (k + 1) * math.cos(time + k)
        velocity[(RANK, *[RANK - 1] * (order - 1))] = 1.0
        weight = self.value(time)
        turning = [mode_product(weight, rate, mode) for mode, rate in enumerate(self.rates)]
        return multi_mode_product(velocity, turned) + torch.stack(turning).sum(dim=0)

    def _core(self, time: float) -> Tensor:
        order, core = self.small.ndim, self.small.clone()
        for k in range(RANK - 1):
            core[(k,) * order] = 0.5**k * (1 + 0.5 * math.sin(time + k))
        core[(RANK, *[RANK - 1] * (order - 1))] = time
        return core

    def _turned(self, time: float) -> list[Tensor]:
        pairs = zip(self.rates, self.bases, strict=True)
        return [torch.linalg.matrix_exp(time * rate) @ basis for rate, basis in pairs]


def squared_distance(target: Tensor) -> Loss:
    """L(W) = ||W - target||^2 / 2, with gradient W - target and smoothness 1."""
    return lambda weight: (weight - target).square().sum() / 2


def final_error(kind: str, sigma: float, steps: int, method: str) -> float:
    """||W_N - X(1)|| / ||X(1)|| after N steps of size 1 / N along a loss that moves with X.

    The loss ||W - X(t) - X'(t)||^2 / 2 has the gradient flow W' = X + X' - W, of which X is the
    solution.
    """
    curve, lr = Curve(kind, sigma), 1 / steps
    layer = curve.layer()
    optimizer = optimizer_of(layer, method, lr)
    for step in range(steps):
        time = step * lr
        loss = squared_distance(curve.value(time) + curve.derivative(time))
        optimizer.step(closure_of(layer, loss))
    final = curve.value(1.0)
    return float((weight_of(layer) - final).norm() / final.norm())


def fit_steps(kind: str, sigma: float, method: str) -> int | None:
    """Steps until ||W - A||^2 is 1 % of its start; None if it is not within the limit.

    W starts at X(0) of `Curve`; A differs from it in sigma u_4 alone, in the place of which it has
    u_5.
    """
    curve = Curve(kind, sigma)
    start, order = curve.value(0.0), len(SHAPES[kind])
    change = -curve.small
    change[(RANK, *[RANK - 1] * (order - 1))] = 1.0
    loss = squared_distance(start + multi_mode_product(change, curve.bases))
    enough = STALL_FRACTION * float(loss(start))
    weight, layer = start, curve.layer()
    optimizer = None if method == "dense" else optimizer_of(layer, method, STALL_LR)
    for step in range(STALL_LIMIT + 1):
        value = float(loss(weight))
        if value <= enough or not math.isfinite(value):
            return step if value <= enough else None
        if optimizer is None:
            weight = weight - STALL_LR * dense_gradient(loss, weight)
        else:
            optimizer.step(closure_of(layer, loss))
            weight = weight_of(layer)
    return None


# (b) Descent, (c) distance


@dataclass(frozen=True)
class Observed:
    """One step, seen from the dense weight.

    Attributes:
        weight: W_0.
        gradient: g = grad L(W_0).
        used: Z, the part of g that the step may follow: P g for `parallel`, with the projection P
            onto the tangent space; g x_i B_i B_i^T for `bug`, with the augmented bases B_i.
        moved: W_0 - lr Z.
        result: W_1.
    """

    weight: Tensor
    gradient: Tensor
    used: Tensor
    moved: Tensor
    result: Tensor


def dense_gradient(loss: Loss, weight: Tensor) -> Tensor:
    leaf = weight.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def tangent_space(layer: TuckerLayer) -> TangentSpace:
    layout = Layout([layer.shape], [layer.ranks], layer.learned_modes)
    return TangentSpace(
        layer.core.detach()[None], [u.detach()[None] for u in layer.factors], layout
    )


def observe_step(layer: TuckerLayer, optimizer: tdlrt.TDLRT, loss: Loss) -> Observed:
    """Take one step without closure, so that `bug` shows its augmented bases on the way."""
    weight, closure = weight_of(layer), closure_of(layer, loss)
    gradient = dense_gradient(loss, weight)
    closure()
    if optimizer.integrator == "parallel":
        space = tangent_space(layer)
        used = space.to_tensor(space.project(gradient[None]))[0]
    else:
        optimizer.step()
        used = multi_mode_product(gradient, [u.detach() @ u.detach().mT for u in layer.factors])
        closure()
    optimizer.step()
    moved = weight - optimizer.param_groups[0]["lr"] * used
    return Observed(weight, gradient, used, moved, weight_of(layer))


def log_cosh(target: Tensor) -> Loss:
    """L(W) = sum log cosh(W - target), a robust fit: smoothness 1, gradient of full rank."""

    def loss(weight: Tensor) -> Tensor:
        distance = (weight - target).abs()
        return (distance + nn.functional.softplus(-2 * distance) - math.log(2)).sum()

    return loss


def guaranteed_descent(step: Observed, lr: float, tau: float, smoothness: float = 1.0) -> float:
    """The lower bound of docs/theory.md on L(W_0) - L(W_1)."""
    used, gradient = float(step.used.norm()), float(step.gradient.norm())
    cut = tau * float(step.moved.norm())
    lost = (gradient + smoothness * lr * used) * cut + smoothness / 2 * cut**2
    return lr * (1 - smoothness * lr / 2) * used**2 - lost


def descent(
    kind: str,
    integrator: str,
    tau: float,
    steps: int = 40,
    fit: Callable[[Tensor], Loss] = log_cosh,
) -> tuple[list[float], list[float]]:
    """Measured and guaranteed descent of every step of a run.

    For tau = 0, which would double the ranks in every step, the run is one at fixed rank, and from
    each of its points a copy takes one step with tau = 0.
    """
    lr, shape = 0.5, SHAPES[kind]
    scale = math.sqrt(math.prod(shape))
    loss = fit(2 * scale * decaying_tensor(shape, SEED + 1))
    layer = tucker_layer(0.3 * scale * decaying_tensor(shape, SEED + 2), RANK)
    run = optimizer_of(layer, integrator, lr, tau or None)
    measured, guaranteed = [], []
    for _ in range(steps):
        trial = layer if tau else copy.deepcopy(layer)
        step = observe_step(trial, run if tau else optimizer_of(trial, integrator, lr, 0.0), loss)
        measured.append(float(loss(step.weight) - loss(step.result)))
        guaranteed.append(guaranteed_descent(step, lr, tau))
        if not tau:
            run.step(closure_of(layer, loss))
    return measured, guaranteed


def distance(kind: str, integrator: str, tau: float, steps: int = 60) -> dict[str, float]:
    """Distance from the dense trajectory, its bound, and the share of the gradient not followed.

    Linear regression: L(W) = <(W - A) x_2 H, W - A> / 2 with inputs of covariance H, eigenvalues
    from 0.1 to 1. Both trajectories start at the same full-rank weight. The distance is
    the largest of the run, relative to the norm of the dense weight at its end.
    """
    lr, shape = 1.0, SHAPES[kind]
    target = decaying_tensor(shape, SEED + 1)
    eigenvalues = torch.linspace(0.1, 1, shape[1], dtype=torch.float64)
    turn = random_basis(shape[1], shape[1], torch.Generator().manual_seed(SEED + 3))
    covariance = turn @ eigenvalues.diag() @ turn.mT

    def loss(weight: Tensor) -> Tensor:
        return (mode_product(weight - target, covariance, 1) * (weight - target)).sum() / 2

    contraction = float((1 - lr * eigenvalues).abs().max())
    dense = 0.3 * decaying_tensor(shape, SEED + 2)
    layer = tucker_layer(dense, "full")
    optimizer = optimizer_of(layer, integrator, lr, tau)
    bound, missed, distances, bounds = 0.0, 0.0, [0.0], [0.0]
    for _ in range(steps):
        step = observe_step(layer, optimizer, loss)
        dense = dense - lr * dense_gradient(loss, dense)
        normal = lr * float((step.gradient - step.used).norm())
        missed = contraction * missed + normal
        bound = contraction * bound + normal + tau * float(step.moved.norm())
        distances.append(float((step.result - dense).norm()))
        bounds.append(bound)
    norm = float(dense.norm())
    return {
        "distance": max(distances) / norm,
        "bound": max(bounds) / norm,
        "missed": missed / norm,
    }


# (d) Paths of rank r


def reproduction_errors(
    kind: str, path: str, integrator: str, sigma: float, steps: int = 8
) -> list[float]:
    """Relative errors ||W_k - A_k|| / ||A_k|| along a sequence A_0, A_1, ... of rank r.

    Step k has the loss <A_k - A_{k+1}, W> and lr = 1: gradient descent on the dense weight goes
    from A_k to A_{k+1}. All singular values of A_k stay as they are, the smallest is sigma; the
    bases turn by 1/8, all in every step ("all modes") or one after the other ("one mode").
    """
    curve = Curve(kind, sigma)
    turns = [torch.linalg.matrix_exp(rate / 8) for rate in curve.rates]
    here = curve.value(0.0)
    layer = curve.layer()
    optimizer = optimizer_of(layer, integrator, 1.0)
    errors = []
    for step in range(steps):
        there = here
        for mode, turn in enumerate(turns):
            if path == "all modes" or mode == step % len(turns):
                there = mode_product(there, turn, mode)
        increment = there - here

        def loss(weight: Tensor, increment: Tensor = increment) -> Tensor:
            return -(increment * weight).sum()

        optimizer.step(closure_of(layer, loss))
        errors.append(float((weight_of(layer) - there).norm() / there.norm()))
        here = there
    return errors


# Figures


def draw(result: dict[str, Any], folder: Path = FIGURES, suffix: str = "svg") -> None:
    """All figures."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "error": draw_error(result["error"]),
        "stall": draw_stall(result["stall"]),
        "descent": draw_descent(result["descent"]),
        "distance": draw_distance(result["distance"]),
        "reproduction": draw_reproduction(result["reproduction"]),
    }
    for name, figure in figures.items():
        save(figure, folder / f"theory_{name}.{suffix}")


def save(figure: Figure, path: Path) -> None:
    """Write a figure; an SVG has the same bytes every time."""
    with matplotlib.rc_context({"svg.hashsalt": "tdlrt"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_error(rows: list[Row]) -> Figure:
    figure, panels = chart(2, 2, "step size", "relative error at time 1")
    shades = matplotlib.colormaps["viridis"].resampled(len(SIGMAS) + 1)
    sizes = [1 / steps for steps in STEPS]
    for axes, method in zip(panels, METHODS, strict=True):
        axes.set_title(TITLES[method], fontsize=10)
        axes.loglog(sizes, sizes, color="#999999", linestyle=":", label="step size")
        for number, sigma in enumerate(SIGMAS):
            chosen = select(rows, kind="conv2d", method=method, sigma=sigma)
            axes.plot(
                sizes,
                [row["error"] for row in chosen],
                color=shades(number),
                linewidth=6 - 1.2 * number,  # equal errors stay visible: thin lines on thick ones
                label=f"$\\sigma$ = {sigma:g}",
            )
        axes.set_ylim(1e-3, 1e4)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=6, frameon=False, fontsize=8.5)
    return figure


def draw_stall(rows: list[Row]) -> Figure:
    figure, panels = chart(1, 2, "smallest singular value of the start", "steps to 1 % of the loss")
    markers = (("s", 11), ("o", 7), ("x", 5), ("^", 5))
    for axes, kind in zip(panels, SHAPES, strict=True):
        axes.set_title(TITLES[kind], fontsize=10)
        for method, (marker, size) in zip(FITTERS, markers, strict=True):
            chosen = select(rows, kind=kind, method=method)
            axes.semilogx(
                SIGMAS,
                [row["steps"] for row in chosen],
                color=COLOURS[method],
                marker=marker,
                markersize=size,
                markerfacecolor="none",
                label=TITLES[method],
            )
        axes.set_ylim(bottom=0)
    legend(figure, panels[0])
    return figure


def draw_descent(rows: list[Row]) -> Figure:
    figure, panels = chart(2, 2, "step", "descent of the loss")
    cases = [(tau, integrator) for tau in DESCENT_TAUS[:2] for integrator in INTEGRATORS]
    for axes, (tau, integrator) in zip(panels, cases, strict=True):
        axes.set_title(f"{TITLES[integrator]}, tau {tau:g}", fontsize=10)
        (row,) = select(rows, kind="conv2d", integrator=integrator, tau=tau)
        steps = range(1, len(row["measured"]) + 1)
        axes.plot(steps, row["measured"], color="#0072b2", linewidth=2.2, label="measured")
        axes.plot(
            steps, row["guaranteed"], color="#d55e00", linestyle="--", label="guaranteed at least"
        )
        if tau:
            axes.set_yscale("symlog", linthresh=0.1)
            axes.axhline(0, color="#999999", linewidth=0.8)
        else:
            axes.set_yscale("log")
    legend(figure, panels[0])
    return figure


def draw_distance(rows: list[Row]) -> Figure:
    figure, panels = chart(1, 2, "tau", "relative distance from the dense run")
    for axes, kind in zip(panels, SHAPES, strict=True):
        axes.set_title(TITLES[kind], fontsize=10)
        axes.loglog(TAUS, TAUS, color="#999999", linestyle=":", label="tau")
        for integrator, marker, size in zip(INTEGRATORS, "ox", (8, 6), strict=True):
            chosen = select(rows, kind=kind, integrator=integrator)
            for name, line in (("distance", "-"), ("bound", "--")):
                label = TITLES[integrator] + (", bound" if name == "bound" else "")
                axes.plot(
                    TAUS,
                    [row[name] for row in chosen],
                    color=COLOURS[integrator],
                    linestyle=line,
                    marker=marker if name == "distance" else None,
                    markersize=size,
                    label=label,
                )
    legend(figure, panels[0], columns=3)
    return figure


def draw_reproduction(rows: list[Row]) -> Figure:
    figure, panels = chart(1, 2, "smallest singular value of the path", "largest relative error")
    eps = torch.finfo(torch.float64).eps
    for axes, kind in zip(panels, SHAPES, strict=True):
        axes.set_title(TITLES[kind], fontsize=10)
        bounds = [eps / sigma for sigma in SIGMAS]
        axes.loglog(SIGMAS, bounds, color="#999999", linestyle=":", label="eps / $\\sigma$")
        for integrator in INTEGRATORS:
            for path, line, marker in zip(PATHS, ("-", "--"), "ox", strict=True):
                chosen = select(rows, kind=kind, integrator=integrator, path=path)
                axes.plot(
                    SIGMAS,
                    [row["error"] for row in chosen],
                    color=COLOURS[integrator],
                    linestyle=line,
                    marker=marker,
                    label=f"{integrator}, {path}",
                )
        axes.set_ylim(1e-17, 1)
    legend(figure, panels[0], columns=3)
    return figure


def chart(rows: int, columns: int, x_label: str, y_label: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(7, 1.2 + 2.5 * rows), dpi=92, layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False).flat)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(x_label, fontsize=10)
    figure.supylabel(y_label, fontsize=10)
    return figure, panels


def legend(figure: Figure, axes: Axes, columns: int = 2) -> None:
    lines, labels = axes.get_legend_handles_labels()
    figure.legend(
        lines, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9
    )


def select(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


# The page


def page(text: str, result: dict[str, Any]) -> str:
    """docs/theory.md with the tables between its markers made from a result."""
    blocks = {
        "error": error_table(result["error"]),
        "stall": stall_table(result["stall"]),
        "descent": descent_table(result["descent"]),
        "distance": distance_table(result["distance"]),
        "reproduction": reproduction_table(result["reproduction"]),
        "provenance": provenance(result),
    }
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{block}\n{end}{rest.partition(end)[2]}"
    return text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def error_table(rows: list[Row]) -> str:
    """Errors at the smallest step, and the order that the last halving of the step shows."""
    lines = []
    for kind in SHAPES:
        for method in METHODS:
            cells = [TITLES[kind], TITLES[method]]
            orders = []
            for sigma in SIGMAS:
                *_, coarse, fine = select(rows, kind=kind, method=method, sigma=sigma)
                cells.append(f"{fine['error']:.2g}")
                orders.append(math.log2(coarse["error"] / fine["error"]))
            lines.append([*cells, f"{min(orders):.2f} to {max(orders):.2f}"])
    header = [f"sigma {sigma:g}" for sigma in SIGMAS]
    return table(["layer", f"method, {STEPS[-1]} steps", *header, "order"], lines)


def stall_table(rows: list[Row]) -> str:
    lines = [
        [TITLES[kind], TITLES[method]]
        + [str(row["steps"] or "-") for row in select(rows, kind=kind, method=method)]
        for kind in SHAPES
        for method in FITTERS
    ]
    return table(["layer", "method", *[f"sigma {sigma:g}" for sigma in SIGMAS]], lines)


def descent_table(rows: list[Row]) -> str:
    lines = [
        [
            TITLES[row["kind"]],
            row["integrator"],
            f"{row['tau']:g}",
            f"{row['margin']:.1g}",
            f"{sum(value > 0 for value in row['guaranteed'])} of {len(row['guaranteed'])}",
            str(sum(value < 0 for value in row["measured"])),
        ]
        for row in rows
    ]
    header = ["layer", "integrator", "tau", "smallest measured - guaranteed"]
    return table([*header, "steps with a guarantee above 0", "steps that raised the loss"], lines)


def distance_table(rows: list[Row]) -> str:
    """Distances with the slope of the line through their logarithms, bounds, and parts of them."""
    names = {"distance": "", "bound": ", bound", "missed": ", of it the gradient not followed"}
    lines = []
    for kind in SHAPES:
        for integrator in INTEGRATORS:
            chosen = select(rows, kind=kind, integrator=integrator)
            for name, label in names.items():
                values = [row[name] for row in chosen]
                slope = f"{log_slope(TAUS, values):.2f}" if name == "distance" else ""
                cells = [f"{value:.2g}" for value in values]
                lines.append([TITLES[kind], integrator + label, *cells, slope])
    return table(["layer", "integrator", *[f"tau {tau:g}" for tau in TAUS], "slope"], lines)


def log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the least-squares line through (log x, log y)."""
    a, b = torch.tensor([x, y], dtype=torch.float64).log()
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a @ a))


def reproduction_table(rows: list[Row]) -> str:
    lines = [
        [TITLES[kind], integrator, path]
        + [
            f"{row['error']:.1e}"
            for row in select(rows, kind=kind, integrator=integrator, path=path)
        ]
        for kind in SHAPES
        for integrator in INTEGRATORS
        for path in PATHS
    ]
    header = [f"sigma {sigma:g}" for sigma in SIGMAS]
    return table(["layer", "integrator", "bases turn", *header], lines)


def provenance(result: dict[str, Any]) -> str:
    facts = [
        ", ".join(f"{key} {value}" for key, value in result[name].items())
        for name in ("versions", "machine")
    ]
    return f"`{result['command']}`, seed {result['seed']}; {facts[0]}; {facts[1]}."


if __name__ == "__main__":
    main()
