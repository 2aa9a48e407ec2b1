"""The data set `stdlib`: the sources of Python's own standard library."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from tdlrt.errors import DataError
from tdlrt_lab.data.text_data import TextData

__all__ = ["read_stdlib"]

LEFT_OUT = frozenset({"test", "tests", "idle_test", "encodings", "pydoc_data"})
"""Folders of tests, and of tables and texts that are no source code."""

SIZES = range(2**10, 2**17)
"""Bytes of a file: shorter ones are stubs, and one longer file would be much of the text."""

TEST_EVERY = 10
"""Every so many files, one belongs to the test set."""

FEWEST_FILES = 2 * TEST_EVERY


def read_stdlib(name: str, context: int, folder: Path | None = None) -> TextData:
    """Read the modules of the standard library of this Python; nothing is downloaded.

    The files are sorted by path, and every tenth is a test file. Taken are the files NAME.py of
    importable modules, below the folder and its packages, in ASCII alone, from 1,024 to 131,071
    bytes, outside of folders with tests, encodings and help texts. Versions of Python differ in
    them, so a run is compared with runs of the same version.

    Args:
        name: Name of the data set.
        context: Characters of a window.
        folder: The folder of the modules; None for `sysconfig.get_path("stdlib")`.

    Raises:
        DataError: There are too few files, as in a Python whose library is in an archive.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    files = [torch.frombuffer(text, dtype=torch.uint8) for text in _texts(folder)]
    if len(files) < FEWEST_FILES:
        raise DataError(
            f"{name}: {folder} holds {len(files)} modules of Python as source files; expected at "
            f"least {FEWEST_FILES}; use a Python that has its standard library as files"
        )
    is_test = [number % TEST_EVERY == TEST_EVERY - 1 for number in range(len(files))]
    train, test = (
        tuple(file for file, tested in zip(files, is_test, strict=True) if tested is wanted)
        for wanted in (False, True)
    )
    return TextData(name=name, train_files=train, test_files=test, context=context)


def _texts(folder: Path) -> Iterator[bytearray]:
    """The contents of the files, in the order of their paths on every system."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    for name in sorted(paths):
        *packages, _ = parts = PurePosixPath(name).with_suffix("").parts
        if not all(part.isidentifier() for part in parts) or not LEFT_OUT.isdisjoint(packages):
            continue
        try:
            text = paths[name].read_bytes() if paths[name].stat().st_size in SIZES else b""
        except OSError as error:
            raise DataError(f"{paths[name]}: cannot be read ({error.strerror})") from error
        if text and text.isascii():
            yield bytearray(text)  # torch needs a buffer that it may write to
