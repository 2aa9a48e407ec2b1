"""One run on several processes started by torchrun; with one process these do nothing."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tdlrt.errors import ConfigError
from tdlrt.integrations.distributed import keep_group, wrap
from tdlrt.optim import TDLRT
from tdlrt_lab.config import RunConfig
from tdlrt_lab.run.liveness import companions_watched

__all__ = [
    "any_process",
    "broadcast_buffers",
    "distribute",
    "is_first",
    "process_count",
    "process_number",
    "processes",
    "share",
    "total",
]


@contextmanager
def processes(config: RunConfig, out: Path, resume: bool) -> Iterator[Path]:
    """Initialise the process group: NCCL with one GPU per process, or gloo on CPUs.

    Each process watches the others and torchrun (`liveness.py`).

    Yields:
        The run directory. Every process but the first gets a temporary copy, so that code which
        writes files need not ask which process it runs in.

    Raises:
        ConfigError: There are more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield out
        return
    dist.init_process_group(_backend(config))
    keep_group()
    try:
        with companions_watched(), tempfile.TemporaryDirectory() as folder:
            own = out if is_first() else Path(folder) / "run"
            if resume and not is_first() and out.exists():
                shutil.copytree(out, own)
            dist.barrier()
            yield own
    finally:
        dist.destroy_process_group()


def _backend(config: RunConfig) -> str:
    device = config.torch_device()
    if device.type != "cuda":
        return "gloo"
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.index is not None or local >= count:
        raise ConfigError(
            f"device {config.device!r}: got process {local} of a machine with {count} GPUs, "
            "expected 'cuda' and at most as many processes as GPUs; change --nproc-per-node"
        )
    torch.cuda.set_device(local)
    return "nccl"


def process_number() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    """The number of processes that train this network."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files and reports."""
    return process_number() == 0


def distribute(model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """The module to call in training: the model, or its wrapper for several processes."""
    if not dist.is_initialized():
        return model
    if isinstance(optimizer, TDLRT):
        return wrap(model, optimizer)[0]
    return DistributedDataParallel(model)


def share(batch: Tensor) -> tuple[Tensor, float]:
    """The part of a batch for this process, and the weight of its mean loss.

    The weighted mean losses, averaged over the processes, give the mean loss of the batch. If there
    are fewer images than processes, some processes get the first image with weight 0.
    """
    own = batch[process_number() :: process_count()]
    return own if len(own) else batch[:1], len(own) * process_count() / len(batch)


def total(value: Tensor) -> Tensor:
    """The sum over all processes; every process must call it."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def any_process(holds: Callable[[], bool], device: torch.device) -> bool:
    """Whether `holds` returns true in any process; every process must call it."""
    return bool(total(torch.tensor(int(holds()), device=device)))


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers of the first process, such as running statistics, to all processes."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
