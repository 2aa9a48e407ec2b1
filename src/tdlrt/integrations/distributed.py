"""Data-parallel training: one all-reduce for cores and bases, torch's for other parameters."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tdlrt.errors import IntegratorStateError
from tdlrt.integrations.replicas import (
    FactorAverage,
    broadcast_weights,
    check_arguments,
    check_group,
    check_replicas,
    keep_group,
)
from tdlrt.integrations.sharding import ShardedTeam
from tdlrt.nn.models import tucker_layers
from tdlrt.optim import TDLRT

__all__ = ["check_replicas", "keep_group", "prepare", "wrap"]


def wrap(
    model: nn.Module,
    optimizer: TDLRT,
    *,
    shard_integrator: bool = False,
    check_every: int = 100,
    reduce_dtype: torch.dtype | None = None,
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
        reduce_dtype: Type in which gradients of cores and bases are sent and summed, such as
            torch.bfloat16; by default their own. For the other parameters, register a
            communication hook of torch with the returned model.
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
    average = _prepared(model, options.get("process_group"), check_every, reduce_dtype)
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


def _prepared(
    model: nn.Module,
    process_group: dist.ProcessGroup | None,
    check_every: int,
    reduce_dtype: torch.dtype | None = None,
) -> FactorAverage:
    every = check_arguments(check_every, reduce_dtype)
    check_group()
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
    broadcast_weights(layers.values(), process_group)
    # DistributedDataParallel looks up a parameter of the root module as ".core".
    ignored |= names | {f".{name}" for name in names}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)  # type: ignore[no-untyped-call]
    return FactorAverage(model, process_group, every, reduce_dtype)
