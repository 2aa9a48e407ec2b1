"""Atomic writing of the files of a run, and reading of JSON objects."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tdlrt.errors import CheckpointError, RunError
from tdlrt.files import write_atomically

__all__ = ["parse_object", "read_object", "write_text", "writing"]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the file system while `path` is written into a `RunError` with advice.

    Raises:
        RunError: The file cannot be written, for example because the disk is full.
    """
    try:
        yield
    except (OSError, CheckpointError) as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        raise RunError(
            f"{path}: cannot be written ({reason}); files written before are intact: make the "
            "path writable or free disk space, then continue with --resume"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        RunError: It cannot be written.
    """
    with writing(path):
        write_atomically(path, lambda file: file.write(text.encode()))


def read_object(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: The file.
        what: What the object is, for error messages.

    Raises:
        RunError: The file cannot be read, or contains something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot read the {what} ({error})") from error
    return parse_object(text, str(path), what)


def parse_object(text: str, place: str, what: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: The JSON text.
        place: Where it was read, for error messages.
        what: What the object is, for error messages.

    Raises:
        RunError: It is not valid JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{place}: cannot read the {what} ({error})") from error
    if not isinstance(value, dict):
        raise RunError(f"{place}: got {type(value).__name__}, expected an object")
    return value
