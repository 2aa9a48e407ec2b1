"""Whole layers on several processes: equal at the start, averaged gradients, compared weights."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Collection, Mapping
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import unserializable_hook

from tdlrt.errors import IntegratorStateError
from tdlrt.nn import TuckerLayer
from tdlrt.nn.models import tucker_layers
from tdlrt.optim import TDLRT
from tdlrt.optim.shards import is_sharded
from tdlrt.scalars import as_int

__all__ = [
    "FactorAverage",
    "broadcast_weights",
    "check_arguments",
    "check_group",
    "check_replicas",
    "keep_group",
]

# The integer type of the same width as a floating-point type, to compare sums of bit patterns.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_groups: set[dist.ProcessGroup | None] = set()  # see keep_group


def check_replicas(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
    """Compare shapes and bits of all parameters over the processes. Every process must call it.

    Parameters that `fully_shard_` has shared out are left out.

    Raises:
        IntegratorStateError: They differ; the message names the first parameter that does.
    """
    check_group()
    _compare(dict(model.named_parameters()), process_group)


def _compare(parameters: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    whole = {name: p for name, p in parameters.items() if not is_sharded(p)}
    width = 2 + max(parameter.ndim for parameter in whole.values())
    rows = []
    for parameter in whole.values():
        values = parameter.detach()
        bits = values.view(_BITS.get(values.element_size(), torch.uint8)).sum(dtype=torch.int64)
        shape = list(values.shape) + [-1] * (width - 1 - values.ndim)
        rows.append(torch.cat([torch.tensor(shape, device=bits.device), bits[None]]))
    own = torch.stack(rows)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    differing = torch.stack([(other != found[0]).any(dim=1) for other in found]).tolist()
    for number, name in enumerate(whole):
        others = [process for process, rows in enumerate(differing) if rows[number]]
        if others:
            shapes = [tuple(s for s in other[number, :-1].tolist() if s >= 0) for other in found]
            raise IntegratorStateError(
                f"{name}: differs between process 0 (shape {shapes[0]}) and process {others[0]} "
                f"(shape {shapes[others[0]]}), expected equal parameters; start all processes "
                "from the same checkpoint and change weights, ranks and options on all of them"
            )


def keep_group(group: dist.ProcessGroup | None = None) -> None:
    """Keep a process group, or the default one, alive, and sleep briefly when the process ends.

    Otherwise a DistributedDataParallel that outlives the group, for example in a traceback, would
    hold the last reference to it. torch would then deadlock: it waits for a gloo thread, which
    waits for Python's lock, which torch holds. The same thread needs the lock to free the tensors
    of a collective shortly after the caller has the result; if Python has ended by then, torch
    aborts. Hence the sleep.
    """
    if not _groups:
        atexit.register(time.sleep, 0.1)
    _groups.add(group or dist.group.WORLD)


def check_arguments(check_every: int, reduce_dtype: torch.dtype | None = None) -> int:
    """Refuse what `FactorAverage` cannot use.

    Returns:
        check_every, as Python's own int.

    Raises:
        ValueError: check_every is out of range, or reduce_dtype is no floating-point type.
    """
    every = as_int(check_every)
    if every is None or every < 1:
        raise ValueError(f"check_every: got {check_every!r}, expected an int of at least 1")
    if reduce_dtype is not None and not reduce_dtype.is_floating_point:
        raise ValueError(
            f"reduce_dtype: got {reduce_dtype}, expected a floating-point type such as "
            "torch.bfloat16, or None"
        )
    return every


def check_group() -> None:
    """Refuse to go on without a process group.

    Raises:
        IntegratorStateError: There is none.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise IntegratorStateError(
            "torch.distributed: there is no process group; start the script by torchrun and call "
            "torch.distributed.init_process_group() first"
        )


@torch.no_grad()
def broadcast_weights(
    layers: Collection[TuckerLayer], process_group: dist.ProcessGroup | None
) -> None:
    """Give all processes the ranks, cores and bases of the first process."""
    device = next(iter(layers)).core.device
    own = torch.tensor([rank for layer in layers for rank in layer.ranks], device=device)
    dist.broadcast(own, group=process_group, group_src=0)
    ranks = iter(own.tolist())
    for layer in layers:
        core = layer.core.new_empty([next(ranks) for _ in layer.ranks])
        factors = [f.new_empty(len(f), r) for f, r in zip(layer.factors, core.shape, strict=True)]
        if core.shape == layer.core.shape:
            core.copy_(layer.core)
            for copy, factor in zip(factors, layer.factors, strict=True):
                copy.copy_(factor)
        for tensor in (core, *factors):
            dist.broadcast(tensor, group=process_group, group_src=0)
        layer.resize_(core, factors)


class FactorAverage:
    """Averages the gradients of cores and bases at the end of every backward pass.

    DistributedDataParallel cannot do this, because its buckets keep the sizes that the parameters
    had at its construction. The gradients are sent in one buffer of the present size. Averaging is
    complete before `backward` returns, so clipping, a scaler or the caller of a closure see the
    average. In the core steps of `bug`, only the gradients of cores are sent, and those of the
    bases, which no step reads, are dropped.

    Args:
        model: A model with Tucker layers.
        process_group: The processes; all by default.
        check_every: Backward passes between two comparisons of the processes' parameters.
        reduce_dtype: Type in which gradients are sent and summed; by default their own.

    Attributes:
        engine: Returns the DistributedDataParallel of the model, or None.
        optimizer: The optimiser of the model, if it is known.
    """

    def __init__(
        self,
        model: nn.Module,
        process_group: dist.ProcessGroup | None,
        check_every: int,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self.engine: Callable[[], DistributedDataParallel | None] = lambda: None
        self.optimizer: TDLRT | None = None
        self._group, self._check_every = process_group, check_every
        self._reduce_dtype = reduce_dtype
        self._passes = 0
        self._pass: int | None = None
        self._compared = {n: p for n, p in model.named_parameters() if not is_sharded(p)}
        layers = tucker_layers(model).values()
        self._cores: list[Tensor] = [layer.core for layer in layers]
        self._bases: list[Tensor] = [
            layer.factors[mode] for layer in layers for mode in layer.learned_modes
        ]
        # Any parameter may be the first, or the only one of this process, to get a gradient.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._after_gradient)  # type: ignore[no-untyped-call]

    @unserializable_hook  # type: ignore[untyped-decorator]
    def _after_gradient(self, parameter: Tensor) -> None:
        """Schedule one averaging at the end of the current backward pass."""
        current = torch._C._current_graph_task_id()
        if current != self._pass:
            self._pass = current
            engine = self.engine()
            if engine is None or engine.require_backward_grad_sync:
                Variable._execution_engine.queue_callback(self._average)

    def _ranks_differ(self) -> bool:
        """Whether buffers would differ in size between processes, so an all-reduce could hang."""
        if self.optimizer is not None and self.optimizer.ranks_frozen:
            return False
        shapes = repr([tuple(parameter.shape) for parameter in (*self._cores, *self._bases)])
        own = torch.tensor(crc32(shapes.encode()), device=self._cores[0].device)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(found, own, group=self._group)
        return len(set(torch.stack(found).tolist())) > 1

    def _sent(self) -> list[Tensor]:
        """The parameters whose gradients the next step reads."""
        if self.optimizer is None or self.optimizer.moves_bases:
            return [p for p in (*self._cores, *self._bases) if p.requires_grad]
        for basis in self._bases:
            basis.grad = None
        return [core for core in self._cores if core.requires_grad]

    @torch.no_grad()
    def _average(self) -> None:
        engine = self.engine()
        if engine is not None and engine._join_config.enable:
            raise IntegratorStateError(
                "join: got a backward pass inside it, where processes that have run out of batches "
                "would not average cores and bases; give every process as many batches "
                "(torch.utils.data.DistributedSampler does)"
            )
        if self._passes % self._check_every == 0 or self._ranks_differ():
            _compare(self._compared, self._group)
        self._passes += 1
        parameters = self._sent()
        if not parameters:
            return
        present = [float(parameter.grad is not None) for parameter in parameters]
        parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
        flat = torch.cat([*parts, parts[0].new_tensor(present)])
        flat = flat.to(self._reduce_dtype or flat.dtype)
        flat /= dist.get_world_size(self._group)
        dist.all_reduce(flat, group=self._group)
        *means, found = torch.split(flat, [*(len(part) for part in parts), len(parameters)])
        somewhere = found.tolist() if 0.0 in present else present
        for parameter, mean, share in zip(parameters, means, somewhere, strict=True):
            if share:  # otherwise no process has a gradient
                mean = mean.view_as(parameter).to(parameter)
                if parameter.grad is None:
                    parameter.grad = mean.clone()
                else:
                    parameter.grad.copy_(mean)
