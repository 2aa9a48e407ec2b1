"""Atomic writing of the files of a run below its folder, and reading of JSON objects."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tdlrt.errors import CheckpointError, RunError
from tdlrt.files import read_text, write_atomically

__all__ = ["check_own", "own_folder", "parse_object", "read_object", "write_text", "writing"]


@contextmanager
def writing(path: Path, *, then: str = "continue with --resume") -> Iterator[None]:
    """Turn errors of the file system while `path` is written into a `RunError` with advice.

    Args:
        path: The file.
        then: What to do once it can be written.

    Raises:
        RunError: The file cannot be written, for example because the disk is full.
    """
    try:
        yield
    except (OSError, CheckpointError) as error:
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        raise RunError(
            f"{path}: cannot be written ({reason}); files written before are intact: make the "
            f"path writable or free disk space, then {then}"
        ) from error


def own_folder(folder: Path, *, within: Path) -> Path:
    """Make a folder below another one, which no link on the way may leave.

    Args:
        folder: The folder; it may exist.
        within: The folder of a run or of a report, wherever a link to it may lead.

    Raises:
        RunError: It cannot be made, or a link leads out of `within`.
    """
    check_own(folder, within=within)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_own(folder: Path, *, within: Path) -> None:
    """Refuse a folder that a link puts elsewhere: a copied run must not write or delete there.

    Raises:
        RunError: A link leads out of `within`.
    """
    place = folder.resolve()
    if not place.is_relative_to(within.resolve()):
        raise RunError(
            f"{folder}: is a link to {place}, outside {within}; expected a folder; replace the "
            "link by one, or choose another directory with --out"
        )


def write_text(path: Path, text: str, *, then: str = "continue with --resume") -> None:
    """Write a text file atomically.

    Args:
        path: The file.
        text: Its content.
        then: See `writing`.

    Raises:
        RunError: It cannot be written.
    """
    with writing(path, then=then):
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
        text = read_text(path)
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
        if "\\ud" in text.lower():  # half a surrogate pair, which cannot be printed
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RunError(f"{place}: cannot read the {what} ({error})") from error
    if not isinstance(value, dict):
        raise RunError(f"{place}: got {type(value).__name__}, expected an object")
    return value
