"""`save` and `load`: a model in a safetensors file that carries its ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from tdlrt.errors import CheckpointError
from tdlrt.files import write_atomically
from tdlrt.linalg import TuckerTensor
from tdlrt.nn import TuckerLayer
from tdlrt.serialization.header import KEY, Header, LayerFormat, checksum, maps_strings
from tdlrt.serialization.slots import (
    check_names,
    check_shape,
    check_values,
    distinct_tensors,
    key,
    plan_slots,
)
from tdlrt.surgery import build_layer, replace_modules

__all__ = ["load", "save"]


def save(
    model: nn.Module, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Store the state of a model as safetensors, with ranks and modes of its Tucker layers.

    A file at `path` is replaced, missing folders are made. At any moment the old or the whole new
    file is there, so a training loop may write to the same path over and over. Tensors that the
    model shares are stored once.

    Args:
        model: Any model, with Tucker layers or without; not changed.
        path: The file; `.safetensors` is the usual ending.
        metadata: Texts to keep beside the weights, such as {"tau": "0.1"}; `load` returns them.

    Raises:
        CheckpointError: The path is a folder or cannot be written, the metadata are not all
            strings, or the state holds something that safetensors cannot store.
    """
    path, metadata = Path(path), dict(metadata or {})
    if os.path.isdir(path):  # Path.is_dir raises for names that are too long
        raise CheckpointError(f"{path}: is a folder, expected the name of a file in it")
    if not maps_strings(metadata):
        raise CheckpointError(f"metadata: got {metadata!r}, expected strings by name")
    tensors, aliases = distinct_tensors(model.state_dict())
    layers = {
        name: LayerFormat(module.ranks, module.learned_modes)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, TuckerLayer)
    }
    header = Header(layers=layers, aliases=aliases, metadata=metadata)
    # One entry: safetensors writes several in random order, and equal models give equal files.
    text = header.to_json(checksum(header, tensors))
    try:
        content = safetensors.torch.save(tensors, {KEY: text})
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"model: safetensors cannot store its state ({error})") from error
    try:
        write_atomically(path, lambda file: file.write(content))
    except (OSError, ValueError) as error:  # the latter for a NUL in the name
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def load(path: str | os.PathLike[str], model: nn.Module) -> dict[str, str]:
    """Take up a state that `save` stored, in place. Nothing in the file is run as code.

    Layers that are dense in the model and in Tucker format in the file are replaced by Tucker
    layers; Tucker layers take the ranks of the file. All other Parameters, biases among them, stay
    the objects they are, so an optimiser of a model with Tucker layers keeps holding them. Values
    take the device and the floating-point type that the model has. Everything is checked before
    anything is changed, except whether values are finite: a mask may hold infinite ones.

    Args:
        path: A file that `save` wrote, with this version of the library or an earlier one.
        model: The network that was saved, its layers dense or in Tucker format at any ranks.

    Returns:
        The metadata given to `save`.

    Raises:
        CheckpointError: The file cannot be read, is damaged, of another kind or of a newer version,
            or does not fit the model, which is as before.
    """
    path = Path(path)
    with _named_after(path), safetensors.safe_open(path, "pt") as file:
        header, expected = Header.from_json((file.metadata() or {}).get(KEY))
        slots, dense = plan_slots(model, header.layers)
        names = file.keys()
        check_names({*names, *header.aliases}, slots)
        sources = {name: header.aliases.get(name, name) for name in slots}
        for name, slot in slots.items():
            check_shape(name, tuple(file.get_slice(sources[name]).get_shape()), slot)
        stored = {name: file.get_tensor(name) for name in names}
        if checksum(header, stored) != expected:
            raise CheckpointError("is damaged (its checksum differs); take another copy of it")
        state = {name: stored[source] for name, source in sources.items()}
        check_values(state, slots)
    layers = {
        module: _tucker_layer(module, name, header.layers[name], state)
        for module, name in dense.items()
    }
    replace_modules(model, layers)
    model.load_state_dict(state)
    return header.metadata


def _tucker_layer(
    module: nn.Module, name: str, layer: LayerFormat, state: Mapping[str, Tensor]
) -> TuckerLayer:
    """The layer of a file in the place of a dense one, with its bias."""
    factors = tuple(state[key(name, f"factors.{mode}")] for mode in range(len(layer.ranks)))
    return build_layer(
        module,
        rank=TuckerTensor(state[key(name, "core")], factors),
        modes="all" if len(layer.learned) == len(layer.ranks) else "channels",
    )


@contextmanager
def _named_after(path: Path) -> Iterator[None]:
    """Turn whatever a bad file causes into a `CheckpointError` that names it."""
    try:
        if path.is_dir():
            raise CheckpointError("is a folder, expected a file that tdlrt.save wrote")
        if not path.exists():
            raise CheckpointError("there is no such file")
        if not path.is_file():  # a pipe would be waited for
            raise CheckpointError("is no file, expected one that tdlrt.save wrote")
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, RuntimeError, MemoryError) as error:  # there is no memory to map it into
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: {_kind(path)} ({error})") from error


def _kind(path: Path) -> str:
    """What a file is that is not readable as safetensors."""
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return "is empty, expected a file that tdlrt.save wrote"
    if start == b"PK\x03\x04":
        return (
            "is a zip file, as torch.save writes pickles, and no pickle is read here; take "
            "torch.load(..., weights_only=True) and model.load_state_dict"
        )
    return "is damaged or no safetensors file; take another copy of it"
