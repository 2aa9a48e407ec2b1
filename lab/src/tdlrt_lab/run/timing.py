"""Time, parameters and bytes of a Tucker network and of the dense one, measured in turns."""

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
from tdlrt.nn.models import tucker_layers
from tdlrt.optim import TDLRT
from tdlrt.ranks import RankPolicy
from tdlrt.surgery import factorize_, to_plain

__all__ = [
    "Case",
    "batch_in_channels_last",
    "channels_last",
    "compare_networks",
    "inference",
    "inference_seconds",
    "median_seconds",
    "parameter_count",
    "weight_bytes",
]

Name = TypeVar("Name", bound=Hashable)

SHORTEST_SAMPLE = 0.05
"""Seconds."""

RATE = 1e-6
"""A learning rate too small to change the ranks, and with them the work of a step."""


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to time.

    Attributes:
        run: The function to time; called without arguments.
        period: Number of calls after which the cost repeats; only whole periods are timed.
        clock: Reads the time in seconds; that of the wall by default, once the device is done.
    """

    run: Callable[[], object]
    period: int = 1
    clock: Callable[[], float] = _now

    def seconds(self) -> float:
        """Mean seconds per call, over whole periods: at least 0.05 seconds, or 20 periods."""
        calls, start = 0, self.clock()
        while not calls or (calls < 20 * self.period and self.clock() - start < SHORTEST_SAMPLE):
            for _ in range(self.period):
                self.run()
            calls += self.period
        return (self.clock() - start) / calls


def median_seconds(cases: Mapping[Name, Case], rounds: int) -> dict[Name, float]:
    """Median seconds per call of each case, over `rounds` rounds after a warm-up round.

    Each round times every case once, so that a temporary slowdown of the machine affects all of
    them.
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
    """Measure a training step and inference of a network, dense and in Tucker format.

    The times of the dense network are those of the faster of two memory layouts. The Tucker network
    is trained with the integrator 'parallel' and converted by `to_plain` for inference.

    Args:
        model: The dense network; not changed.
        images: A batch of images, (N, channels, height, width), or of text, (N, context).
        labels: Its classes, (N,) or (N, context).
        rank: The ranks, as for `factorize_`.
        policy: The rank policy of the optimiser.
        rounds: Timed rounds.

    Returns:
        'networks', one row each for dense and tucker, and 'layers', one row per Tucker layer; times
        are in milliseconds.
    """
    dense, last = copy.deepcopy(model), channels_last(copy.deepcopy(model))
    tucker = copy.deepcopy(model)
    factorize_(tucker, rank=rank)
    images_last = batch_in_channels_last(images)
    options: dict[str, Any] = {"lr": RATE, "momentum": 0.9}
    plain = to_plain(tucker)
    optimizers = {
        "dense": torch.optim.SGD(dense.parameters(), **options),
        "dense, channels last": torch.optim.SGD(last.parameters(), **options),
        "tucker": TDLRT(tucker, torch.optim.SGD, rank_policy=policy, **options),
    }
    trained = {"dense": dense, "dense, channels last": last, "tucker": tucker}
    steps = {
        name: _training_step(
            network, optimizers[name], images if name == "dense" else images_last, labels
        )
        for name, network in trained.items()
    }
    used = {"dense": dense, "dense, channels last": last, "tucker": channels_last(plain)}
    passes = {
        name: inference(copy.deepcopy(network).eval(), images if name == "dense" else images_last)
        for name, network in used.items()
    }
    step_times, pass_times = median_seconds(steps, rounds), median_seconds(passes, rounds)
    networks = []
    for name, network in (("dense", model), ("tucker", plain)):
        columns = [column for column in steps if column.startswith(name)]
        networks.append(
            {
                "network": name,
                "parameters": parameter_count(network),
                "bytes": weight_bytes(network),
                "step_ms": 1e3 * min(step_times[column] for column in columns),
                "inference_ms": 1e3 * min(pass_times[column] for column in columns),
            }
        )
    return {"networks": networks, "layers": _layers(tucker, images_last, rounds)}


def inference_seconds(
    networks: Mapping[str, nn.Module], images: Tensor, rounds: int
) -> dict[str, float]:
    """Median seconds per forward pass of each network, in the faster of two memory layouts.

    Args:
        networks: Networks by name; not changed.
        images: A batch of images or of text.
        rounds: Timed rounds, in each of which every network is timed once.
    """
    images_last = batch_in_channels_last(images)
    cases = {(name, 0): inference(copy.deepcopy(n), images) for name, n in networks.items()}
    for name, network in networks.items():
        cases[name, 1] = inference(channels_last(copy.deepcopy(network)), images_last)
    seconds = median_seconds(cases, rounds)
    return {name: min(seconds[name, 0], seconds[name, 1]) for name in networks}


def parameter_count(model: nn.Module) -> int:
    """Number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Size of the state of a model as a safetensors file, in bytes."""
    return len(save({name: t.detach().contiguous() for name, t in model.state_dict().items()}))


def _layers(model: nn.Module, images: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Times of a forward and backward pass of each Tucker layer and of its dense form."""
    layers = tucker_layers(model)
    calls = watch_calls(model, layers.values(), images)
    rows = []
    for name, layer in layers.items():
        if not calls[layer]:
            continue
        input = calls[layer][0].input
        dense, last = layer.to_dense(), channels_last(layer.to_dense())
        cases = {
            "dense": _forward_backward(dense, input.contiguous()),
            "dense, channels last": _forward_backward(last, input),
            "tucker": _forward_backward(layer, input),
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


def batch_in_channels_last(inputs: Tensor) -> Tensor:
    """A batch of images in the memory format `channels_last`; other batches as they are."""
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs


def channels_last(model: nn.Module) -> nn.Module:
    """Change the weights of a model to the memory format `channels_last`, in place."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Case:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return Case(run=lambda: optimizer.step(closure))  # type: ignore[arg-type]


def inference(network: Callable[[Tensor], Tensor], images: Tensor) -> Case:
    """A forward pass without gradients."""

    def run() -> None:
        with torch.inference_mode():
            network(images)

    return Case(run=run)


def _forward_backward(layer: nn.Module, images: Tensor) -> Case:
    input = images.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    leaves: Sequence[Tensor] = [p for p in layer.parameters() if p.requires_grad]
    with torch.no_grad():
        gradient = torch.ones_like(layer(input))
    return Case(run=lambda: torch.autograd.grad(layer(input), [input, *leaves], gradient))
