"""A whole training step as one CUDA graph, as long as ranks do not change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tdlrt.errors import IntegratorStateError
from tdlrt.optim.optimizer import TDLRT

__all__ = ["GraphedStep"]

# Steps before a capture, in which libraries set themselves up; torch's own advice is three.
_WARM_UP = 3

# Replays between two readings of the number of skipped steps.
_LOOK_EVERY = 100


class GraphedStep:
    """A training step, captured in a CUDA graph and replayed: loss, gradients, optimiser.

    These steps are not captured and run in the usual way: steps in which ranks are examined, a few
    steps after ranks have changed, steps on a batch of another shape, and all steps on a CPU.

    Args:
        optimizer: A `TDLRT(..., capturable=True)` with integrator 'parallel'.
        compute_loss: Computes the loss of a batch of tensors, without reading values on the host.

    Raises:
        IntegratorStateError: The optimiser is not capturable, or its integrator is not `parallel`.

    >>> import tdlrt
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> report = tdlrt.factorize_(model)
    >>> optimizer = tdlrt.TDLRT(model, torch.optim.SGD, lr=0.1, capturable=True)
    >>> step = tdlrt.GraphedStep(optimizer, lambda x, y: torch.nn.functional.mse_loss(model(x), y))
    >>> step(torch.randn(4, 8), torch.zeros(4, 2)).shape
    torch.Size([])
    """

    def __init__(self, optimizer: TDLRT, compute_loss: Callable[..., Tensor]) -> None:
        if not optimizer.capturable or optimizer.integrator != "parallel":
            raise IntegratorStateError(
                f"optimizer: got capturable={optimizer.capturable} and integrator="
                f"{optimizer.integrator!r}, expected capturable=True and 'parallel'; construct "
                "TDLRT(..., capturable=True)"
            )
        self._optimizer, self._compute_loss = optimizer, compute_loss
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._loss = torch.zeros(())
        self._version: tuple[int, ...] = ()
        self._warm = self._replays = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Take one training step on a batch.

        Args:
            *inputs: Arguments of compute_loss.

        Returns:
            The loss, a detached scalar; the next step overwrites it.

        Raises:
            NonFiniteError: More than skip_nonfinite steps in a row were not finite.
        """
        optimizer = self._optimizer
        if not inputs[0].is_cuda:
            return self._run(inputs)
        self._drop_if_outdated()
        if optimizer.examines_next or not self._fits(inputs) or self._warm < _WARM_UP:
            return self._run_aside(inputs)
        if self._graph is None:
            self._capture(inputs)
        else:
            optimizer.end_step()
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        self._graph.replay()  # type: ignore[union-attr]
        self._replays += 1
        if self._replays % _LOOK_EVERY == 0:
            optimizer.count_skipped()
        return self._loss

    def _run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        self._optimizer.zero_grad()
        loss = self._compute_loss(*inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.detach()

    def _run_aside(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Run on a side stream, as CUDA graphs require of the steps before a capture."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            loss = self._run(inputs)
        current.wait_stream(stream)
        self._drop_if_outdated()
        self._warm += 1
        return loss

    def _drop_if_outdated(self) -> None:
        """Drop a graph whose tensors no longer exist, because ranks have changed for instance."""
        version = self._optimizer.storage_version
        if version != self._version:
            self._graph, self._warm, self._version = None, 0, version

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [given.clone() for given in inputs]
        self._graph = torch.cuda.CUDAGraph()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(self._graph):
            self._loss = self._run(tuple(self._inputs))

    def _fits(self, inputs: tuple[Tensor, ...]) -> bool:
        if self._graph is None:
            return True
        return [(i.shape, i.dtype) for i in inputs] == [(i.shape, i.dtype) for i in self._inputs]
