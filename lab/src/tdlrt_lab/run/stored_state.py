"""Validation of a training checkpoint before a run continues from it."""

import os
import reprlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdlrt.files import open_regular
from tdlrt_lab.run.metrics import EpochMetrics, is_finite_number
from tdlrt_lab.run.rank_changes import check_rank_changes

__all__ = ["check_position", "read_state"]

MAX_VALUES = 2_000_000
"""Values in a state; an object that is referenced twice counts twice."""


def read_state(path: Path, device: torch.device) -> Any:
    """Read a file of `torch.save` that contains only tensors and plain types; runs no code.

    Raises:
        Exception: Of almost any type, if the file is damaged or would need more memory than its
            size.
    """
    with open_regular(path) as file:
        if file.read(4) != b"PK\x03\x04":  # torch.load also accepts older formats
            raise ValueError("not an archive of torch.save")
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            size = os.fstat(file.fileno()).st_size
            if not stored or sum(entry.file_size for entry in entries) > size:
                raise ValueError("its contents are larger than the file")
            broken = archive.testzip()  # torch.load ignores the checksums
        if broken is not None:
            raise ValueError(f"wrong checksum of {broken}")
        file.seek(0)
        state = torch.load(file, map_location=device, weights_only=True)
    for value in _values(state):
        if isinstance(value, Tensor) and not _has_all_values(value):
            raise ValueError(f"a tensor of shape {tuple(value.shape)} without that many values")
    return state


def check_position(state: dict[str, Any], epochs: int, steps_per_epoch: int) -> None:
    """Check the position and the metrics of a state against the length of the run.

    Raises:
        ValueError: A field has the wrong type or is out of range.
    """
    if not isinstance(state["model"], dict):
        raise ValueError("model: expected tensors by name")
    epoch, batch, history = state["epoch"], state["batch"], state["history"]
    last = 0 if epoch == epochs else steps_per_epoch
    is_valid = type(epoch) is type(batch) is int and 0 <= epoch <= epochs and 0 <= batch <= last
    if not is_valid:
        raise ValueError(
            f"epoch {epoch!r}, batch {batch!r}: expected integers from 0 to {epochs} and {last}"
        )
    if not isinstance(history, list) or len(history) != epoch:
        raise ValueError("history: expected one entry per finished epoch")
    for metrics in history:
        EpochMetrics.from_dict(metrics)
    start = epoch * steps_per_epoch
    check_rank_changes(state.get("rank_changes", []), start, start + batch)  # earlier: none
    for name in ("lr", "seconds"):
        if not is_finite_number(state[name]):
            raise ValueError(f"{name} {state[name]!r}: expected a finite number")
    for name in ("seen", "skipped_steps", "skipped_in_a_row"):
        value = state.get(name, 0)  # earlier versions had none of them
        if type(value) is not int or not 0 <= value < 2**53:
            raise ValueError(f"{name} {reprlib.repr(value)}: expected an integer from 0")
    for name in ("loss_sum", "correct"):
        value = state.get(name)
        if not isinstance(value, Tensor) or value.ndim or value.is_complex():
            raise ValueError(f"{name} {reprlib.repr(value)}: expected a tensor of one number")


def _values(state: object) -> Iterator[object]:
    """All values in nested containers; fails if there are too many, as in a circular one."""
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


def _has_all_values(tensor: Tensor) -> bool:
    """Whether a tensor is dense and its storage contains all of its values."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
