"""What every format is written from, and its trace by torch.export."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tdlrt.errors import ExportError

__all__ = ["EXTRA", "Source", "quiet", "trace"]

EXTRA = "export"

_CALIBRATION_BATCH = 64

# They announce on every machine without torchvision, or without one kind of GPU, that something
# is left out which no exported network uses.
_NOISY_LOGGERS = ("torch.onnx._internal.exporter._registration", "torchao", "torch.utils._pytree")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A network on its way into a file.

    Attributes:
        model: The trained network, in evaluation mode on the CPU.
        plain: The same as plain torch layers.
        example: Two inputs, for tracing.
        calibration: Inputs that set the ranges of int8, (N, ...), or None for floats.
        metadata: Text to store beside the network.
    """

    model: nn.Module
    plain: nn.Module
    example: Tensor
    calibration: Tensor | None
    metadata: Mapping[str, str]

    def calibration_batches(self) -> Iterator[Tensor]:
        """The calibration inputs, some at a time."""
        if self.calibration is not None:
            yield from torch.split(self.calibration, _CALIBRATION_BATCH)


def trace(model: nn.Module, example: Tensor, *, strict: bool = False) -> ExportedProgram:
    """The graph of a network for any batch size, by torch.export.

    Args:
        model: The network.
        example: A batch of its inputs.
        strict: Whether the graph notes which layer each node comes from, in every version of torch.

    Raises:
        ExportError: torch.export cannot trace the network.
    """
    try:
        shapes = ({0: Dim("batch")},)
        return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=strict)
    except Exception as error:  # whatever a forward method or the tracer raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"model: torch.export cannot trace {type(model).__name__} for any batch size "
            f"({reason}); make its forward method free of branches on values and of fixed batch "
            "sizes, or use format 'plain'"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what torch's exporters and torchao say about themselves, and nothing else."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # torch's own modules still use what torch has deprecated.
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            warnings.filterwarnings("ignore", r"`torch\.jit\.script_method`", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
