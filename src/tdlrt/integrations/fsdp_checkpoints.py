"""Checkpoints that every process writes its part of, and any number of processes reads."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tdlrt.errors import CheckpointError
from tdlrt.files import PART, sync_folder
from tdlrt.nn.models import tucker_layers
from tdlrt.optim import TDLRT
from tdlrt.optim.shards import is_sharded, own_part

__all__ = ["load", "save"]

_REST = "optimizer"
"""Name of the tensor that holds, as JSON in UTF-8, what of the optimiser's state is no tensor."""

_MODEL, _STATE = "model.", "optimizer."


@torch.no_grad()
def save(
    model: nn.Module,
    optimizer: TDLRT,
    folder: str | os.PathLike[str],
    *,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Write the states of a model and its optimiser with `torch.distributed.checkpoint`.

    The folder holds safetensors files, of each process its parts and of one process what is whole.
    It appears under its name when it is complete. All processes must call it.

    Args:
        model: The model, given to `fully_shard_` or not.
        optimizer: Its optimiser.
        folder: A new folder, on a file system that all processes share.
        process_group: The processes; all by default.

    Raises:
        CheckpointError: The folder exists, it cannot be written, or the state holds something that
            is neither a tensor nor JSON.
    """
    path = Path(folder)
    part = path.with_name(path.name + PART)
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"model: got {name} of type {type(value).__name__} in its state_dict, expected "
                "tensors; leave it out of the state_dict"
            )
        tensors[_MODEL + name] = value.detach()
    rest = _without_tensors(optimizer.state_dict(), _STATE, tensors)
    tensors[_REST] = torch.tensor(list(json.dumps(rest).encode()), dtype=torch.uint8)
    _on_first(lambda: _check_new(path, part), process_group)
    writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
    with _errors_that_say(f"{path}: cannot be written"):
        state_dict_saver.save(_apart(tensors), storage_writer=writer, process_group=process_group)
    _on_first(lambda: _publish(part, path), process_group)


@torch.no_grad()
def load(
    model: nn.Module,
    optimizer: TDLRT,
    folder: str | os.PathLike[str],
    *,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Continue from what `save` has written, on any number of processes.

    The Tucker layers get the ranks of the checkpoint. All processes must call it.

    Args:
        model: The network that was saved, at any ranks, given to `fully_shard_` or not.
        optimizer: Its optimiser, constructed as the one that was saved.
        folder: The folder.
        process_group: The processes; all by default.

    Raises:
        CheckpointError: The folder cannot be read, is incomplete, or holds another network.
        IntegratorStateError: The optimiser's state does not fit. Nothing was changed in any case.
    """
    path = Path(folder)
    stored = _stored(path)
    own = model.state_dict()
    _check_names(model, own, stored, path)
    _, size = stored[_REST]
    code = _read({_REST: torch.empty(size, dtype=torch.uint8)}, path, process_group)[_REST]
    try:
        rest = json.loads(bytes(code.tolist()))
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged ({error}); load another") from error
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    targets = {}
    for name, (dtype, shape) in stored.items():
        like = own.get(name.removeprefix(_MODEL)) if name.startswith(_MODEL) else None
        number = name.split(".")[2] if name.startswith(f"{_STATE}state.") else ""
        if number.isdigit() and int(number) < len(parameters):
            like = parameters[int(number)]
        if like is not None and is_sharded(like) and like.shape == shape:
            targets[name] = torch.zeros_like(like, dtype=dtype)
        elif name != _REST:
            device = None if like is None or not shape else like.device
            targets[name] = torch.zeros(shape, dtype=dtype, device=device)
    values = _read(targets, path, process_group)
    weights = {n.removeprefix(_MODEL): v for n, v in values.items() if n.startswith(_MODEL)}
    state = _with_tensors(rest, values, path)
    before = {name: value.detach().clone() for name, value in own.items()}
    try:
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    except BaseException:
        model.load_state_dict(before)
        raise


def _without_tensors(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """A state as JSON, in which the names of tensors stand for these."""
    if isinstance(value, Tensor):
        name = place.removesuffix(".")
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [[k, _without_tensors(v, f"{place}{k}.", tensors)] for k, v in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        items = [_without_tensors(v, f"{place}{n}.", tensors) for n, v in enumerate(value)]
        return {kind: items}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise CheckpointError(
        f"optimizer: got {place.removesuffix('.')} of type {type(value).__name__} in its "
        "state_dict, expected tensors, numbers, texts, lists and dicts"
    )


def _with_tensors(value: Any, tensors: Mapping[str, Tensor], path: Path) -> Any:
    """The state of which `_without_tensors` made JSON."""
    try:
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == "tensor":
            return tensors[inner]
        if kind == "dict":
            return {k: _with_tensors(v, tensors, path) for k, v in inner}
        return {"list": list, "tuple": tuple}[kind](_with_tensors(v, tensors, path) for v in inner)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}); load another") from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as safetensors wants them."""
    found, known = {}, set()
    for name, tensor in tensors.items():
        value = tensor.contiguous()
        place = own_part(value).untyped_storage().data_ptr()
        found[name] = value.clone() if place in known else value
        known.add(place)
    return found


def _stored(path: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Type and shape of each tensor of a checkpoint, every entry of which is there."""
    try:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    found = {}
    tensors = {n: of for n, of in metadata.items() if isinstance(of, TensorStorageMetadata)}
    for name, of in tensors.items():
        present = sum(math.prod(chunk.sizes) for chunk in of.chunks)
        if present != math.prod(of.size):
            raise CheckpointError(
                f"{path}: has {present} of the {math.prod(of.size)} entries of {name}, expected "
                "all; a file is missing, or is there twice"
            )
        found[name] = (of.properties.dtype, torch.Size(of.size))
    if _REST not in found:
        raise CheckpointError(
            f"{path}: has no tensor {_REST!r}, expected a folder that "
            "tdlrt.integrations.fsdp_checkpoints.save wrote; a file may be missing"
        )
    return found


def _check_names(
    model: nn.Module,
    own: Mapping[str, Tensor],
    stored: Mapping[str, tuple[torch.dtype, torch.Size]],
    path: Path,
) -> None:
    """Refuse another network: other names, or other shapes than ranks explain."""
    names = {name.removeprefix(_MODEL) for name in stored if name.startswith(_MODEL)}
    differing = sorted(names ^ own.keys())
    if differing:
        where = "the checkpoint" if differing[0] in names else "the model"
        raise CheckpointError(
            f"{path}: {differing[0]} is in {where} only, expected the same names in both; build "
            "the network that was saved"
        )
    free = {
        f"{layer}.{part}".lstrip(".")
        for layer, of in tucker_layers(model).items()
        for part in ("core", *(f"factors.{mode}" for mode in of.learned_modes))
    }
    for name in names - free:
        shape = stored[_MODEL + name][1]
        if shape != own[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(shape)}, expected {tuple(own[name].shape)}; "
                "build the network that was saved"
            )


def _read(
    targets: dict[str, Tensor], path: Path, process_group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    reader = HuggingFaceStorageReader(str(path))
    with _errors_that_say(f"{path}: cannot be read"):
        state_dict_loader.load(targets, storage_reader=reader, process_group=process_group)
    return targets


@contextmanager
def _errors_that_say(what: str) -> Iterator[None]:
    """Make errors of torch.distributed.checkpoint those of this library."""
    try:
        with warnings.catch_warnings():  # that there is one process only
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except Exception as error:
        raise CheckpointError(f"{what} ({error})") from error


def _check_new(path: Path, part: Path) -> None:
    if path.exists():
        raise CheckpointError(f"{path}: exists, expected a new folder; choose another name")
    if part.exists():
        raise CheckpointError(
            f"{part}: is left from a checkpoint that was interrupted, expected no such folder; "
            "remove it"
        )


def _publish(part: Path, path: Path) -> None:
    try:
        part.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def _on_first(action: Callable[[], None], group: dist.ProcessGroup | None) -> None:
    """Let the first process act, while the others wait; its error is raised on all."""
    if not dist.is_initialized():
        action()
        return
    failed: list[CheckpointError | None] = [None]
    if dist.get_rank(group) == 0:
        try:
            action()
        except CheckpointError as error:
            failed = [error]
    dist.broadcast_object_list(failed, group=group, group_src=0)
    if failed[0] is not None:
        raise failed[0]
