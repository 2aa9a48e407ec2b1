"""Layers side by side in threads: small factorisations gain little from threads of their own."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

__all__ = ["by_layer"]

Result = TypeVar("Result")

# Multiply-adds below which handing them over costs as much as it saves.
_LEAST_WORK = 2e7


def by_layer(function: Callable[[str], Result], work: Mapping[str, float]) -> dict[str, Result]:
    """{name: function(name)} for all layers, in several threads where that is faster.

    The threads share torch's number of threads: as many layers are under way at a time as the
    largest one's share of the work allows, so that it does not end long after the others.

    Args:
        function: Run without gradients and autocast. It waits for nothing that another layer does.
        work: Multiply-adds on the CPU that each layer takes, roughly; 0 for one on another device.

    Returns:
        The results, in the order of `work`.

    Raises:
        Exception: What the first layer that failed did raise, once all have ended.
    """
    workers = _workers(work)
    if workers == 1:
        return {name: function(name) for name in work}
    pool = _pool(workers, torch.get_num_threads(), os.getpid())
    largest_first = sorted(work, key=lambda name: -work[name])
    futures = {name: pool.submit(function, name) for name in largest_first}
    wait(futures.values())
    return {name: futures[name].result() for name in work}


def _workers(work: Mapping[str, float]) -> int:
    total = sum(work.values())
    if total < _LEAST_WORK or "OpenMP" not in torch.__config__.parallel_info():
        return 1  # other pools of threads keep the size that they began with
    return min(torch.get_num_threads(), int(total / max(work.values())))


@functools.lru_cache(maxsize=1)
def _pool(workers: int, threads: int, process: int) -> ThreadPoolExecutor:
    """A pool whose workers have their share of torch's threads; it does not outlive a fork."""
    everyone = threading.Barrier(workers + 1)

    def begin() -> None:
        torch.get_num_threads()  # which a thread takes over when it first asks
        torch.set_grad_enabled(False)
        everyone.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="tdlrt", initializer=begin)
    torch.set_num_threads(max(1, threads // workers))
    try:
        for _ in range(workers):
            pool.submit(int)
        everyone.wait()
    finally:
        torch.set_num_threads(threads)
    return pool
