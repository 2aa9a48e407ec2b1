"""One run on several processes that torchrun started; alone, all of this does nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tdlrt.experiments.config import ConfigError, RunConfig
from tdlrt.integrations.distributed import wrap
from tdlrt.optim import TDLRT

__all__ = ["any_process", "engine", "group_of", "is_first", "share", "take_buffers", "total"]


@contextmanager
def group_of(config: RunConfig) -> Iterator[None]:
    """Inside, the processes of torchrun are one group: NCCL on GPUs, one each, and gloo on CPUs.

    Raises:
        ConfigError: There are more processes than GPUs.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield
        return
    device = config.torch_device()
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if device.index is not None or local >= torch.cuda.device_count():
            raise ConfigError(
                f"device {config.device!r}: got process {local} of this machine with "
                f"{torch.cuda.device_count()} GPUs, expected 'cuda' and a GPU for each process"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process writes files and prints; one that is alone does."""
    return int(os.environ.get("RANK", "0")) == 0


def engine(model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """What to call in training in place of the model."""
    if not dist.is_initialized():
        return model
    if isinstance(optimizer, TDLRT):
        return wrap(model, optimizer)[0]
    return DistributedDataParallel(model)


def share(index: Tensor) -> tuple[Tensor, float]:
    """This process's part of a batch, and the weight of its mean loss.

    The average over the processes of weighted means is the mean over the batch. With fewer images
    than processes some get the first image, with weight 0.
    """
    if not dist.is_initialized():
        return index, 1.0
    process, count = dist.get_rank(), dist.get_world_size()
    own = index[process::count]
    return own if len(own) else index[:1], len(own) * count / len(index)


def total(value: Tensor) -> Tensor:
    """Sum over the processes, each of which must call this."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether it holds on any process, each of which must call this."""
    return bool(total(torch.tensor(int(flag), device=device))) if dist.is_initialized() else flag


def take_buffers(model: nn.Module) -> None:
    """Give all processes the first one's running statistics."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
