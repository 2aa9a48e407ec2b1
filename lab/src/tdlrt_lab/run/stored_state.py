"""What is checked of a training checkpoint before a run believes it."""

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdlrt_lab.run.results import is_finite_number, stored_metrics

__all__ = ["check_position", "read_state"]

MAX_VALUES = 2_000_000
"""Numbers, texts and tensors of a state, aliases written out."""


def read_state(path: Path, device: torch.device) -> Any:
    """What `torch.save` wrote: tensors and plain types. Nothing in it is run as code.

    Raises:
        Exception: Nearly any, if the file is damaged, or stands for more memory than it has bytes.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch would read older formats, too
            raise ValueError("no archive of torch.save")
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > os.path.getsize(path):
                raise ValueError("an archive that is larger than its file")
            broken = archive.testzip()  # torch does not compare the checksums that it writes
    if broken is not None:
        raise ValueError(f"checksum of {broken}")
    state = torch.load(path, map_location=device, weights_only=True)
    for value in _values(state):
        if isinstance(value, Tensor) and not _is_whole(value):
            raise ValueError(f"a tensor of shape {tuple(value.shape)} without that many numbers")
    return state


def check_position(state: dict[str, Any], epochs: int, steps_per_epoch: int) -> None:
    """Check that a state is of a run of this length, its metrics as they are written.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(state["model"], dict):
        raise ValueError("model: expected tensors by name")
    epoch, batch, history = state["epoch"], state["batch"], state["history"]
    last = 0 if epoch == epochs else steps_per_epoch
    if not (_is_int(epoch) and _is_int(batch) and 0 <= epoch <= epochs and 0 <= batch <= last):
        raise ValueError(
            f"epoch {epoch!r}, batch {batch!r}: expected at most {epochs} of {steps_per_epoch}"
        )
    if not isinstance(history, list) or len(history) != epoch:
        raise ValueError("history: expected the metrics of each epoch")
    for metrics in history:
        stored_metrics(metrics)
    for name in ("lr", "seconds"):
        if not is_finite_number(state[name]):
            raise ValueError(f"{name} {state[name]!r}: expected a finite number")


def _values(state: object) -> Iterator[object]:
    """All values in nested containers, unless they are too many, as in one that contains itself."""
    waiting, done = [state], 0
    while waiting:
        value = waiting.pop()
        yield value
        done += 1
        if done + len(waiting) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values")
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one that has all of its numbers in memory."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _is_int(value: object) -> bool:
    return type(value) is int
