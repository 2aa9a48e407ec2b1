"""Processes of one group, for tests of data-parallel training."""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, wait
from datetime import timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TIMEOUT = timedelta(seconds=60)
LIMIT = 180  # seconds for a call, the start of the processes included


def on_two_processes(work, *arguments):
    """See `on_processes`."""
    return on_processes(2, work, *arguments)


def on_processes(count, work, *arguments):
    """What `work(process, *arguments)` returns on each process; the first error is raised.

    Processes that hang are killed, which is an error.
    """
    with TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        places = [(n, count) for n in range(count)]
        futures = [_worker(p[0]).submit(_run, work, p, store, arguments) for p in places]
        if wait(futures, LIMIT).not_done:
            for process in multiprocessing.active_children():
                process.kill()
        return [future.result() for future in futures]


@cache
def _worker(number):
    """A process, which imports torch once; every call makes a group of its own.

    It has the same number in all groups, because DTensor remembers that of the first.
    """
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _run(work, place, store, arguments):
    process, count = place
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=process, world_size=count, timeout=TIMEOUT
    )
    try:
        return work(process, *arguments)
    finally:
        dist.destroy_process_group()
