"""Fully sharded data parallelism: dense parameters are shared out, Tucker layers stay whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from tdlrt.errors import SetupError, UnsupportedLayerError
from tdlrt.integrations.replicas import (
    FactorAverage,
    broadcast_weights,
    check_arguments,
    check_group,
    keep_group,
)
from tdlrt.nn.models import tucker_layers
from tdlrt.optim.shards import is_sharded

__all__ = ["fully_shard_"]

Model = TypeVar("Model", bound=nn.Module)


def fully_shard_(
    model: Model,
    units: Iterable[nn.Module] = (),
    *,
    mesh: DeviceMesh | None = None,
    check_every: int = 100,
    reduce_dtype: torch.dtype | None = None,
    **options: Any,
) -> Model:
    """Share out all parameters over the processes except cores and bases, in place.

    torch's `fully_shard` does this: each process holds a part of every other parameter, of its
    gradient and of its state, and gathers them for the passes. Cores and bases, which are small,
    stay whole on every process; their gradients are averaged in one buffer at the end of a backward
    pass. Call it when the model is on its device, and construct `TDLRT` afterwards.

    Args:
        model: A model with Tucker layers.
        units: Modules of the model whose parameters are gathered together, such as its blocks, each
            before any module that contains it. All others are gathered together.
        mesh: The processes, a mesh of one dimension; all by default.
        check_every: Backward passes between two comparisons of cores and bases over the processes.
        reduce_dtype: Type in which gradients of cores and bases are sent and summed; by default
            their own.
        **options: Passed to torch's `fully_shard`, such as reshard_after_forward.

    Returns:
        The model. All processes have the weights and ranks of the first one.

    Raises:
        IntegratorStateError: There is no process group.
        NothingMatchedError: The model has no Tucker layers.
        SetupError: The mesh has several dimensions, or an option asks for parameters of another
            type than the Tucker layers have, or names parameters to leave out.
        UnsupportedLayerError: The model is sharded already (FSDP, tensor parallelism), or a unit is
            not part of it.
        ValueError: check_every or reduce_dtype is out of range.
    """
    check_arguments(check_every, reduce_dtype)
    check_group()
    layers = tucker_layers(model)
    units = list(units)
    _check_model(model, units)
    tucker = {
        parameter
        for layer in layers.values()
        for parameter in (layer.core, *layer.factors)
        if isinstance(parameter, nn.Parameter)
    }
    device = next(iter(layers.values())).core.device
    _check_options(options, {parameter.dtype for parameter in tucker})
    if mesh is None:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    if mesh.ndim != 1:
        raise SetupError(
            f"mesh: got one of {mesh.ndim} dimensions, expected one; hybrid sharding and tensor "
            "parallelism are not supported"
        )
    group = mesh.get_group()
    keep_group(group)
    broadcast_weights(layers.values(), group)
    _broadcast([*(p for p in model.parameters() if p not in tucker), *model.buffers()], group)
    shard: Callable[..., object] = fully_shard  # whose types mypy cannot match with **options
    for module in (*units, model):
        shard(module, mesh=mesh, ignored_params=tucker, **options)
    for layer in layers.values():
        layer.is_averaged = True
    FactorAverage(model, group, check_every, reduce_dtype)
    return model


def _check_model(model: nn.Module, units: Iterable[nn.Module]) -> None:
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise UnsupportedLayerError(
                f"{name}: is a DTensor, expected a plain parameter; give the model to fully_shard_ "
                "before anything shards it, with its blocks as units"
            )
        if parameter.is_meta:
            raise UnsupportedLayerError(
                f"{name}: is on the meta device, expected a parameter with values; initialise the "
                "model before it is sharded"
            )
    own = set(model.modules())
    for number, unit in enumerate(units):
        if unit not in own or unit is model:
            raise UnsupportedLayerError(
                f"units: got {type(unit).__name__} in place {number}, expected a module inside the "
                "model"
            )


def _check_options(options: dict[str, Any], dtypes: set[torch.dtype]) -> None:
    if "ignored_params" in options:
        raise SetupError(
            "ignored_params: got some, expected none; cores and bases are left out anyway, and "
            "nothing would average the gradients of other parameters"
        )
    policy = options.get("mp_policy")
    wanted = None if policy is None else policy.param_dtype
    if wanted is not None and dtypes != {wanted}:
        raise SetupError(
            f"mp_policy: got param_dtype={wanted} for Tucker layers of "
            f"{', '.join(sorted(map(str, dtypes)))}, which would get inputs of another type than "
            "their weights; use torch.autocast, or a model of this type"
        )


@torch.no_grad()
def _broadcast(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Give all processes the values of the first one."""
    for tensor in tensors:
        value = tensor.detach().contiguous()
        dist.broadcast(value, group=group, group_src=0)
        tensor.copy_(value)
