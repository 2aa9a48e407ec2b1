"""Time, parameters and bytes of a Tucker network next to the dense one, measured side by side."""

import copy
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from tdlrt.nn.calls import watch_calls
from tdlrt.nn.layer import tucker_layers
from tdlrt.optim import TDLRT
from tdlrt.ranks import RankPolicy
from tdlrt.surgery import factorize_, to_plain

__all__ = [
    "Case",
    "channels_last",
    "compare_networks",
    "inference",
    "inference_seconds",
    "median_seconds",
    "weight_bytes",
]

Name = TypeVar("Name", bound=Hashable)

SHORTEST = 0.05

# So small a step that ranks and weights, and with them the work, stay as they are.
RATE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to time.

    Attributes:
        run: Called without arguments.
        period: Calls that are timed together, because they differ.
    """

    run: Callable[[], object]
    period: int = 1

    def seconds(self) -> float:
        """Mean time of a call, over whole periods that take a twentieth of a second in all."""
        calls, start = 0, _now()
        while not calls or (calls < 20 * self.period and _now() - start < SHORTEST):
            for _ in range(self.period):
                self.run()
            calls += self.period
        return (_now() - start) / calls


def median_seconds(cases: Mapping[Name, Case], rounds: int) -> dict[Name, float]:
    """Median time of each case over some rounds, in which the cases take turns.

    What slows the machine down for a while so hits all of them. One more round warms up.
    """
    samples: dict[Name, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            seconds = case.seconds()
            if number:
                samples[name].append(seconds)
    return {name: statistics.median(values) for name, values in samples.items()}


def compare_networks(
    model: nn.Module, images: Tensor, labels: Tensor, rank: Any, policy: RankPolicy, rounds: int
) -> dict[str, Any]:
    """Measure a training step and inference, dense and in Tucker format.

    Dense counts with the faster of its two memory layouts. The Tucker network trains by `parallel`
    and infers as `to_plain` makes it.

    Args:
        model: The dense network; not changed.
        images: A batch, (N, channels, height, width).
        labels: Its classes, (N,).
        rank: Ranks as `factorize_` takes them.
        policy: What examines the ranks in every step.
        rounds: Timed rounds.

    Returns:
        'networks', a row each for dense and tucker, and 'layers', a row per Tucker layer; times of
        a row are milliseconds.
    """
    dense, last = copy.deepcopy(model), channels_last(copy.deepcopy(model))
    tucker = copy.deepcopy(model)
    factorize_(tucker, rank=rank)
    laid_out = images.contiguous(memory_format=torch.channels_last)
    options: dict[str, Any] = {"lr": RATE, "momentum": 0.9}
    plain = to_plain(tucker)
    optimizers = {
        "dense": torch.optim.SGD(dense.parameters(), **options),
        "dense, channels last": torch.optim.SGD(last.parameters(), **options),
        "tucker": TDLRT(tucker, torch.optim.SGD, rank_policy=policy, **options),
    }
    trained = {"dense": dense, "dense, channels last": last, "tucker": tucker}
    steps = {
        name: _step(network, optimizers[name], images if name == "dense" else laid_out, labels)
        for name, network in trained.items()
    }
    used = {"dense": dense, "dense, channels last": last, "tucker": channels_last(plain)}
    passes = {
        name: inference(copy.deepcopy(network).eval(), images if name == "dense" else laid_out)
        for name, network in used.items()
    }
    step_times, pass_times = median_seconds(steps, rounds), median_seconds(passes, rounds)
    networks = []
    for name, network in (("dense", model), ("tucker", plain)):
        columns = [column for column in steps if column.startswith(name)]
        networks.append(
            {
                "network": name,
                "parameters": sum(parameter.numel() for parameter in network.parameters()),
                "bytes": weight_bytes(network),
                "step_ms": 1e3 * min(step_times[column] for column in columns),
                "inference_ms": 1e3 * min(pass_times[column] for column in columns),
            }
        )
    return {"networks": networks, "layers": _layers(tucker, laid_out, rounds)}


def inference_seconds(
    networks: Mapping[str, nn.Module], images: Tensor, rounds: int
) -> dict[str, float]:
    """Median time of a forward pass of each network, in the faster of the two memory layouts.

    Args:
        networks: Networks by name; not changed.
        images: A batch, (N, channels, height, width).
        rounds: Timed rounds, in which the networks take turns.
    """
    laid_out = images.contiguous(memory_format=torch.channels_last)
    cases = {(name, 0): inference(copy.deepcopy(n), images) for name, n in networks.items()}
    for name, network in networks.items():
        cases[name, 1] = inference(channels_last(copy.deepcopy(network)), laid_out)
    seconds = median_seconds(cases, rounds)
    return {name: min(seconds[name, 0], seconds[name, 1]) for name in networks}


def weight_bytes(model: nn.Module) -> int:
    """Size of the model's state as a safetensors file."""
    return len(save({name: t.detach().contiguous() for name, t in model.state_dict().items()}))


def _layers(model: nn.Module, images: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Forward and backward passes of each Tucker layer and of the dense layer, on its own input."""
    layers = tucker_layers(model)
    calls = watch_calls(model, layers.values(), images)
    rows = []
    for name, layer in layers.items():
        if not calls[layer]:
            continue
        given = calls[layer][0].input
        contiguous = given.contiguous()
        dense, last = layer.to_dense(), channels_last(layer.to_dense())
        cases = {
            "dense": _passes(dense, contiguous),
            "dense, channels last": _passes(last, given),
            "tucker": _passes(layer, given),
        }
        seconds = median_seconds(cases, rounds)
        rows.append(
            {
                "layer": name,
                "shape": list(layer.shape),
                "ranks": list(layer.ranks),
                "parameters": layer.weight_parameters,
                "dense_ms": 1e3 * min(seconds["dense"], seconds["dense, channels last"]),
                "tucker_ms": 1e3 * seconds["tucker"],
            }
        )
    return rows


def channels_last(model: nn.Module) -> nn.Module:
    """Lay the weights of a model out with the channels last, in place."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Case:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return Case(run=lambda: optimizer.step(closure))  # type: ignore[arg-type]


def inference(network: Callable[[Tensor], Tensor], images: Tensor) -> Case:
    """A forward pass of a network in evaluation mode."""

    def run() -> None:
        with torch.inference_mode():
            network(images)

    return Case(run=run)


def _passes(layer: nn.Module, given: Tensor) -> Case:
    input = given.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    leaves: Sequence[Tensor] = [p for p in layer.parameters() if p.requires_grad]
    with torch.no_grad():
        gradient = torch.ones_like(layer(input))
    return Case(run=lambda: torch.autograd.grad(layer(input), [input, *leaves], gradient))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
