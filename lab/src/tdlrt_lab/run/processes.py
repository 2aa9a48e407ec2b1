"""One run on several processes that torchrun started; alone, all of this does nothing."""

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

__all__ = [
    "any_process",
    "engine",
    "is_first",
    "process_count",
    "process_number",
    "processes",
    "share",
    "take_buffers",
    "total",
]


@contextmanager
def processes(config: RunConfig, out: Path, resume: bool) -> Iterator[Path]:
    """Make the processes of torchrun a group: NCCL on GPUs, one each, and gloo on CPUs.

    Yields:
        The run directory; for all but the first process a copy that is thrown away, so that what
        writes files need not know.

    Raises:
        ConfigError: There are more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield out
        return
    dist.init_process_group(_backend(config))
    keep_group()
    try:
        with tempfile.TemporaryDirectory() as folder:
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
    """Of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    """How many processes train this network."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that reports."""
    return process_number() == 0


def engine(model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
    """What to call in training in place of the model."""
    if not dist.is_initialized():
        return model
    if isinstance(optimizer, TDLRT):
        return wrap(model, optimizer)[0]
    return DistributedDataParallel(model)


def share(batch: Tensor) -> tuple[Tensor, float]:
    """This process's part of a batch, and the weight of its mean loss.

    The average over the processes of the weighted means is the mean over the batch. With fewer
    images than processes some get the first image, with weight 0.
    """
    own = batch[process_number() :: process_count()]
    return own if len(own) else batch[:1], len(own) * process_count() / len(batch)


def total(value: Tensor) -> Tensor:
    """Sum over the processes, each of which must call this."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def any_process(holds: Callable[[], bool], device: torch.device) -> bool:
    """Whether it holds on any process, each of which must call this."""
    return bool(total(torch.tensor(int(holds()), device=device)))


def take_buffers(model: nn.Module) -> None:
    """Give all processes the first one's running statistics."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
