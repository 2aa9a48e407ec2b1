"""`save` and `load`: a model in a safetensors file that carries its ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tdlrt.errors import CheckpointError
from tdlrt.files import open_regular, write_bytes
from tdlrt.linalg import TuckerTensor
from tdlrt.nn import TuckerLayer
from tdlrt.nn.layer_types import build_layer
from tdlrt.nn.models import check_model
from tdlrt.serialization.header import KEY, Header, LayerFormat, checksum, maps_strings
from tdlrt.serialization.state_tensors import (
    check_names,
    check_shape,
    check_values,
    distinct_tensors,
    expected_tensors,
    key,
)
from tdlrt.surgery import replace_modules, split_attention
from tdlrt.tensor_files import MAX_HEADER, header_length, open_tensors

__all__ = ["load", "save"]


def save(
    model: nn.Module, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Store the state_dict of a model as safetensors, with the ranks of its Tucker layers.

    An existing file at `path` is replaced, and missing folders are made. At any moment either the
    old file or the complete new file exists, so a training loop may write to the same path again
    and again. Tensors that the model shares are stored once.

    Args:
        model: Any model, with Tucker layers or without; not changed.
        path: The file; `.safetensors` is the usual ending.
        metadata: Texts to keep beside the weights, such as {"tau": "0.1"}; `load` returns them.

    Raises:
        CheckpointError: The path is a folder or cannot be written, the metadata are not all
            strings, or safetensors cannot store a value of the state_dict.
        UnsupportedLayerError: The model is no module.
    """
    check_model(model)
    path, metadata = Path(path), dict(metadata or {})
    if not maps_strings(metadata):
        raise CheckpointError(f"metadata: got {metadata!r}, expected strings for keys and values")
    tensors, aliases = distinct_tensors(model.state_dict())
    layers = {
        name: LayerFormat(module.ranks, module.learned_modes, module.reshape)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, TuckerLayer)
    }
    header = Header(layers=layers, aliases=aliases, metadata=metadata)
    # A single entry, so that equal models give equal files: safetensors writes several entries in
    # random order.
    text = header.to_json(checksum(header, tensors))
    try:
        content = safetensors.torch.save(tensors, {KEY: text})
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"model: safetensors cannot store its state ({error})") from error
    if header_length(content) > MAX_HEADER:
        raise CheckpointError(
            f"metadata: with them the header takes {header_length(content):,} bytes, expected at "
            f"most {MAX_HEADER:,}; keep long texts in a file of their own"
        )
    write_bytes(path, content, CheckpointError)


def load(path: str | os.PathLike[str], model: nn.Module) -> dict[str, str]:
    """Load what `save` stored into a model, in place. Nothing in the file is run as code.

    Layers that are dense in the model and in Tucker format in the file are replaced by Tucker
    layers; Tucker layers take the ranks of the file. All other Parameters, including biases, stay
    the same objects, so an optimiser of a model with Tucker layers remains valid. Values take the
    device and the floating-point type of the model. Everything is checked before anything is
    changed, except whether values are finite, because a mask may contain infinite values.

    Args:
        path: A file that `save` of this or an earlier version of the library wrote.
        model: The network that was saved; its layers may be dense or Tucker layers of any ranks.

    Returns:
        The metadata given to `save`.

    Raises:
        CheckpointError: The file cannot be read, is damaged, is of another kind or of a newer
            version, or does not fit the model. The model is not changed then.
        UnsupportedLayerError: The model is no module.
    """
    check_model(model)
    path = Path(path)
    with _opened(path) as file:
        header, stored_checksum = Header.from_json((file.metadata() or {}).get(KEY))
        splits, _ = split_attention(model, {name.rpartition(".")[0] for name in header.layers})
        expected, dense = expected_tensors(model, header.layers, splits)
        names = file.keys()
        check_names({*names, *header.aliases}, expected)
        sources = {name: header.aliases.get(name, name) for name in expected}
        for name, wanted in expected.items():
            check_shape(name, tuple(file.get_slice(sources[name]).get_shape()), wanted)
        stored = {name: file.get_tensor(name) for name in names}
        if checksum(header, stored) != stored_checksum:
            raise CheckpointError("is damaged (its checksum differs); use another copy of the file")
        state = {name: stored[source] for name, source in sources.items()}
        check_values(state, expected)
    layers = {
        module: _tucker_layer(module, name, header.layers[name], state)
        for module, name in dense.items()
    }
    for split in splits.values():
        split.use(layers)
    replace_modules(model, {**layers, **splits})
    model.load_state_dict(state)
    return header.metadata


def _tucker_layer(
    module: nn.Module, name: str, layer: LayerFormat, state: Mapping[str, Tensor]
) -> TuckerLayer:
    """The Tucker layer that a file describes, with the bias of the dense layer it replaces."""
    factors = tuple(state[key(name, f"factors.{mode}")] for mode in range(len(layer.ranks)))
    return build_layer(
        module,
        rank=TuckerTensor(state[key(name, "core")], factors),
        modes="all" if len(layer.learned) == len(layer.ranks) else "channels",
        reshape=layer.reshape,
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The tensors in a file; all that is wrong with it is a `CheckpointError` that names it."""
    try:
        with open_tensors(path) as file:
            yield file
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise CheckpointError(
            f"{path}: is a folder, expected a file that tdlrt.save wrote"
        ) from error
    except (OSError, RuntimeError, MemoryError) as error:  # MemoryError: the file cannot be mapped
        raise CheckpointError(
            f"{path}: cannot be read ({error}); expected a file that tdlrt.save wrote"
        ) from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {_kind(path)} ({error})") from error


def _kind(path: Path) -> str:
    """What is wrong with a file that safetensors cannot read."""
    with open_regular(path) as file:
        start = file.read(4)
    if not start:
        return "is empty, expected a file that tdlrt.save wrote"
    if start == b"PK\x03\x04":
        return (
            "is a zip file, probably a pickle from torch.save, and pickles are not read here; use "
            "torch.load(..., weights_only=True) and model.load_state_dict"
        )
    return "is damaged or not a safetensors file; use another copy of the file"
