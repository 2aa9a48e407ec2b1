"""Files: only regular ones are read, and none is ever half written."""

import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

__all__ = [
    "MAX_TEXT",
    "PART",
    "open_regular",
    "path_of",
    "read_text",
    "remove_parts",
    "sync_folder",
    "write_atomically",
    "write_bytes",
]

PART = ".part"
"""Ending of a file that is being written."""

MAX_TEXT = 2**22
"""Bytes of a text: parsed as JSON, the worst ones take 30 times as many in memory."""

ABANDONED = 3600.0
"""Seconds after its last change from which on a part is that of a process that was killed."""


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading if it is a regular one: no folder, pipe, device or socket.

    The file is opened, without waiting for the other end of a pipe, and its kind is that of what
    was opened: no other file can take its place between the check and the reading.

    Raises:
        OSError: There is no such file, it cannot be read, or it is not a regular one.
    """
    name = os.fspath(path)
    try:
        file = open(name, "rb", opener=_without_waiting)
    except ValueError as error:  # no file has such a name: it contains a NUL, for example
        raise OSError(errno.EINVAL, str(error), name) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is not a regular file", name)
    return file


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # not on every system


def read_text(path: str | os.PathLike[str], *, max_bytes: int = MAX_TEXT) -> str:
    """The text of a regular file in UTF-8.

    Args:
        path: The file.
        max_bytes: Longer files are refused before they are read to the end.

    Raises:
        OSError: There is no such file, it cannot be read, or it is not a regular one.
        ValueError: It is too long, or is not UTF-8.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"more than {max_bytes:,} bytes")
    return content.decode()


def path_of(file: IO[bytes]) -> str:
    """The path of an open file, for a library that wants to open it by itself.

    Where the system has such paths it leads to the very file that is open, whatever stands under
    its name by then.
    """
    own = f"/proc/self/fd/{file.fileno()}"
    return own if os.path.exists(own) else file.name


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that at any moment either the old or the complete new file exists.

    The content goes to a part, a new file of this call alone in the same folder, and from there to
    the disk, before the part takes the place of the old file. Of several processes that write the
    same file the last one wins. A link in its place is replaced and not followed. Missing folders
    are made.

    Args:
        path: The file.
        write: Is given the part, open for writing.

    Raises:
        OSError: The file cannot be written, or something stands there that is neither a regular
            file nor a link; the error names `path`.
    """
    with _errors_that_name(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_replaceable(path)
        remove_parts(path.parent, of=path.name, older_than=ABANDONED)
        part = path.with_name(f"{path.name}.{secrets.token_hex(8)}{PART}")
        try:
            with part.open("xb") as file:  # "x": an existing link is not followed
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_bytes(path: Path, content: bytes, error_type: type[Exception]) -> None:
    """Write a whole file atomically, with an error of the caller's kind if that fails.

    Args:
        path: The file.
        content: Its content.
        error_type: The class of the error.

    Raises:
        error_type: The file cannot be written.
    """
    try:
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise error_type(
            f"{path}: cannot be written ({error.strerror or error}); expected the name of a file, "
            "in a folder that may be written and on a disk with room"
        ) from error


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, so that a renamed file stays renamed.

    Raises:
        OSError: The disk reports an error.
    """
    if not hasattr(os, "O_DIRECTORY"):  # on Windows a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def remove_parts(folder: Path, *, of: str | None = None, older_than: float = 0.0) -> None:
    """Delete the parts in a folder that processes left which were killed while they wrote.

    Args:
        folder: The folder.
        of: Name of the file that they are parts of; None for those of all files.
        older_than: Seconds since the last change of a part from which on it is deleted.
    """
    name = ".+" if of is None else re.escape(of)
    pattern = re.compile(rf"{name}\.[0-9a-f]{{16}}{re.escape(PART)}", re.DOTALL)
    now = time.time()
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name):
                with suppress(OSError):  # another process may have deleted it
                    if now - entry.stat(follow_symlinks=False).st_mtime >= older_than:
                        os.unlink(entry.path)


def _check_replaceable(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "is a folder", str(path))
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))


@contextmanager
def _errors_that_name(path: Path) -> Iterator[None]:
    """Let errors of the system name the file: those of a full disk, for example, name none."""
    try:
        yield
    except ValueError as error:
        if "\0" not in str(path):
            raise
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
