"""The source of an export, which is the same for every format, and its trace by torch.export."""

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

# On every machine without torchvision, or without a certain kind of GPU, these loggers report
# missing parts that no exported network uses.
_NOISY_LOGGERS = ("torch.onnx._internal.exporter._registration", "torchao", "torch.utils._pytree")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A network that is to be exported.

    Attributes:
        model: The trained network, in evaluation mode on the CPU.
        plain: The same network as plain torch layers; in a graph, attention is split into layers.
        example: A batch of two inputs, for tracing.
        calibration: Inputs from which the int8 ranges are set, (N, ...), or None for floats.
        metadata: Strings to store with the network.
    """

    model: nn.Module
    plain: nn.Module
    example: Tensor
    calibration: Tensor | None
    metadata: Mapping[str, str]

    def calibration_batches(self) -> Iterator[Tensor]:
        """The calibration inputs in batches."""
        if self.calibration is not None:
            yield from torch.split(self.calibration, _CALIBRATION_BATCH)


def trace(model: nn.Module, example: Tensor, *, strict: bool = False) -> ExportedProgram:
    """The graph of a network for any batch size, by torch.export.

    Args:
        model: The network.
        example: A batch of its inputs.
        strict: Whether the graph records the layer of each node in every version of torch.

    Raises:
        ExportError: torch.export cannot trace the network.
    """
    try:
        shapes = ({0: Dim("batch")},)
        return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=strict)
    except Exception as error:  # a forward method or the tracer may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"model: torch.export cannot trace {type(model).__name__} for any batch size "
            f"({reason}); make its forward method free of branches on values and of fixed batch "
            "sizes, or use format 'plain'"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the messages of torch's exporters and torchao about themselves, and no others."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # torch's own modules still use functions that torch has deprecated.
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            warnings.filterwarnings("ignore", r"`torch\.jit\.script_method`", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
