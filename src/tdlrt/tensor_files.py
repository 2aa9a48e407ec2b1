"""Files of tensors in the format safetensors, whoever wrote them: opened within limits."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import safetensors
from safetensors import SafetensorError

from tdlrt.files import open_regular, path_of

__all__ = ["MAX_HEADER", "header_length", "open_tensors"]

MAX_HEADER = 2**22
"""Bytes of the header, which is parsed as a whole: some 40,000 tensors, each with a long name."""


def header_length(start: bytes) -> int:
    """Bytes of the header, as the first 8 bytes of a file state them."""
    return int.from_bytes(start[:8], "little")


@contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A file of tensors: its header is parsed, and tensors are read as they are asked for.

    Yields:
        What `safetensors.safe_open` gives. Its tensors are mapped from the file; clone those that
        outlive the block.

    Raises:
        OSError: The file cannot be opened, or is not a regular one.
        SafetensorError: It has another format, or a header beyond `MAX_HEADER`.
    """
    with open_regular(path) as file:
        length = header_length(file.read(8))
        if length > MAX_HEADER:
            raise SafetensorError(f"header of {length:,} bytes, expected at most {MAX_HEADER:,}")
        with safetensors.safe_open(path_of(file), "pt") as tensors:
            yield tensors
