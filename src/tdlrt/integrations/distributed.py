"""Data-parallel training: one all-reduce for cores and bases, torch's for other parameters."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Collection
from typing import Any
from weakref import ref
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import unserializable_hook

from tdlrt.errors import IntegratorStateError
from tdlrt.integrations.sharding import ShardedTeam
from tdlrt.nn import TuckerLayer
from tdlrt.nn.models import tucker_layers
from tdlrt.optim import TDLRT
from tdlrt.scalars import as_int

__all__ = ["check_replicas", "keep_group", "prepare", "wrap"]

# The integer type of the same width as a floating-point type, to compare sums of bit patterns.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_groups: set[dist.ProcessGroup | None] = set()  # see keep_group


def wrap(
    model: nn.Module,
    optimizer: TDLRT,
    *,
    shard_integrator: bool = False,
    check_every: int = 100,
    **options: Any,
) -> tuple[DistributedDataParallel, TDLRT]:
    """Train a model on several processes, each with its share of every batch.

    At the end of a backward pass the gradients are averaged over the processes, except inside
    `no_sync`. DistributedDataParallel averages those of the dense parameters, this module averages
    those of cores and bases.

    Args:
        model: A model with Tucker layers, on its device.
        optimizer: The optimiser of this model.
        shard_integrator: Whether each process computes the steps of only a share of the Tucker
            layers and sends the results to the others. Steps in which a ParameterBudget examines
            ranks are computed by every process.
        check_every: Backward passes between two comparisons of the processes' parameters.
        **options: Passed to DistributedDataParallel.

    Returns:
        The wrapped model, which replaces the model in the training loop, and the optimiser.

    Raises:
        IntegratorStateError: There is no process group, the model was prepared before, or the
            optimiser belongs to another model. Later, in a backward pass: the parameters differ
            between processes, or the pass is inside `join`.
        NothingMatchedError: The model has no Tucker layers.
        ValueError: check_every is out of range.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) not in trained:
            raise IntegratorStateError(
                f"optimizer: does not hold {name} of the model; construct TDLRT with this model"
            )
    average = _prepared(model, options.get("process_group"), check_every)
    average.optimizer = optimizer
    if shard_integrator:
        optimizer.team = ShardedTeam(tucker_layers(model), options.get("process_group"))
    engine = DistributedDataParallel(model, **options)
    average.engine = ref(engine)  # a weak reference, since the model's hooks must not keep it alive
    return engine, optimizer


def prepare(
    model: nn.Module, *, process_group: dist.ProcessGroup | None = None, check_every: int = 100
) -> None:
    """Prepare a model for a library that constructs DistributedDataParallel itself.

    Call it once, after the process group exists and the model is on its device, and before the
    library gets the model (`accelerator.prepare(...)`). See `wrap` for the arguments. `no_sync`
    affects the dense parameters alone, which costs communication but changes no result.
    """
    _prepared(model, process_group, check_every)


def check_replicas(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
    """Compare shapes and bits of all parameters over the processes. Every process must call it.

    Raises:
        IntegratorStateError: They differ; the message names the first parameter that does.
    """
    _check_group()
    parameters = dict(model.named_parameters())
    width = 2 + max(parameter.ndim for parameter in parameters.values())
    rows = []
    for parameter in parameters.values():
        values = parameter.detach()
        bits = values.view(_BITS.get(values.element_size(), torch.uint8)).sum(dtype=torch.int64)
        shape = list(values.shape) + [-1] * (width - 1 - values.ndim)
        rows.append(torch.cat([torch.tensor(shape, device=bits.device), bits[None]]))
    own = torch.stack(rows)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(found, own, group=process_group)
    differing = torch.stack([(other != found[0]).any(dim=1) for other in found]).tolist()
    for number, name in enumerate(parameters):
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


def _prepared(
    model: nn.Module, process_group: dist.ProcessGroup | None, check_every: int
) -> _FactorAverage:
    every = as_int(check_every)
    if every is None or every < 1:
        raise ValueError(f"check_every: got {check_every!r}, expected an int of at least 1")
    _check_group()
    layers = tucker_layers(model)
    names = {
        f"{name}.{part}".lstrip(".")
        for name, layer in layers.items()
        for part in ["core", *(f"factors.{mode}" for mode in range(len(layer.factors)))]
    }
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    if ignored & names:
        raise IntegratorStateError("model: was prepared or wrapped before, expected a new one")
    keep_group(process_group)
    _broadcast_weights(layers.values(), process_group)
    # DistributedDataParallel looks up a parameter of the root module as ".core".
    ignored |= names | {f".{name}" for name in names}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)  # type: ignore[no-untyped-call]
    return _FactorAverage(model, process_group, every)


def _check_group() -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise IntegratorStateError(
            "torch.distributed: there is no process group; start the script by torchrun and call "
            "torch.distributed.init_process_group() first"
        )


@torch.no_grad()
def _broadcast_weights(
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


class _FactorAverage:
    """Averages the gradients of cores and bases at the end of every backward pass.

    DistributedDataParallel cannot do this, because its buckets keep the sizes that the parameters
    had at its construction. The gradients are sent in one buffer of the present size. Averaging is
    complete before `backward` returns, so clipping, a scaler or the caller of a closure see the
    average.
    """

    def __init__(
        self, model: nn.Module, process_group: dist.ProcessGroup | None, check_every: int
    ) -> None:
        self.engine: Callable[[], DistributedDataParallel | None] = lambda: None
        self.optimizer: TDLRT | None = None
        self._model = model
        self._group = process_group
        self._check_every = check_every
        self._passes = 0
        self._pass: int | None = None
        self._parameters = [
            parameter
            for layer in tucker_layers(model).values()
            for parameter in (layer.core, *layer.factors)
            if isinstance(parameter, nn.Parameter)
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
        shapes = repr([tuple(parameter.shape) for parameter in self._parameters])
        own = torch.tensor(crc32(shapes.encode()), device=self._parameters[0].device)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(found, own, group=self._group)
        return len(set(torch.stack(found).tolist())) > 1

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
            check_replicas(self._model, self._group)
        self._passes += 1
        parameters = [p for p in self._parameters if p.requires_grad]
        if not parameters:
            return
        present = [float(parameter.grad is not None) for parameter in parameters]
        parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
        flat = torch.cat([*parts, parts[0].new_tensor(present)])
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
