"""How many threads of torch a step uses: on a CPU a second one does not always help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["threads_for"]

# Multiply-adds of a step below which two threads are no faster than one, on a CPU.
_LEAST_WORK = 2e8


@contextmanager
def threads_for(work: float) -> Iterator[None]:
    """Use one thread of torch for a small step, because waiting for a second one costs more.

    Args:
        work: Multiply-adds of the step, roughly.
    """
    threads = torch.get_num_threads()
    if work > _LEAST_WORK or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
