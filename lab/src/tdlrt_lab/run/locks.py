"""Lock files between processes; the system releases them when their process ends."""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tdlrt.errors import RunError
from tdlrt_lab.run.results import RunDirectory

__all__ = ["exclusive", "lock_file", "sole_owner"]


def lock_file(path: Path, *, timeout: float = -1) -> FileLock:
    """The lock that is a file; its folder is made.

    Args:
        path: The file.
        timeout: Seconds to wait for another process; without one, as long as it takes.

    Raises:
        OSError: Something else than a regular file stands there. Some versions of filelock would
            follow a link and empty the file that it leads to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(errno.EINVAL, "its lock is not a regular file", str(path))
    return FileLock(path, timeout=timeout)


@contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Hold a lock file; yields whether it was acquired, False if another process holds it.

    Raises:
        OSError: The file cannot be made, or is not a regular one.
    """
    lock = lock_file(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def sole_owner(directory: RunDirectory, *, new: bool) -> Iterator[None]:
    """Hold the lock of a run directory, so that no other process writes into it.

    A baseline belongs to the run above it: whoever writes into its directory holds both locks. If
    nothing was written into the directory, the lock is deleted, and so are the directories that
    were created here.

    Args:
        directory: The run directory.
        new: Create the directory if it does not exist; without it, nothing is locked then.

    Raises:
        RunError: Another process is writing into it, or it cannot be written.
    """
    if not new and not directory.path.is_dir():
        yield
        return
    paths = (directory.path, *directory.path.parents)
    created = [path for path in paths if not path.exists()]
    with ExitStack() as stack:
        try:
            acquired = all(stack.enter_context(exclusive(lock)) for lock in _locks(directory))
        except OSError as error:
            raise RunError(
                f"{directory.path}: cannot be written ({error.strerror}); expected a directory for "
                "the results; choose another one with --out"
            ) from error
        if not acquired:
            raise RunError(
                f"{directory.path}: another process is writing to it; wait until that run ends, "
                "or choose another directory with --out"
            )
        try:
            directory.remove_parts()
            yield
        finally:
            _remove_unused(directory, created)


def _remove_unused(directory: RunDirectory, created: Sequence[Path]) -> None:
    with suppress(OSError):
        if list(directory.path.iterdir()) == [directory.lock]:
            directory.lock.unlink()
            for path in created:
                path.rmdir()


def _locks(directory: RunDirectory) -> list[Path]:
    above = RunDirectory(directory.path.absolute().parent)
    is_baseline = above.baseline.path == directory.path.absolute() and above.lock.exists()
    return [above.lock, directory.lock] if is_baseline else [directory.lock]
