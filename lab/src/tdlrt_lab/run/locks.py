"""Locks between processes: each is a file, and ends with the process that holds it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tdlrt.errors import RunError
from tdlrt_lab.run.results import RunDirectory

__all__ = ["exclusive", "sole_owner"]


@contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Hold a lock file; gives False if another process holds it. It ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
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
    """Keep every other process from writing into a run directory.

    Args:
        directory: The run directory.
        new: Whether it is made if it does not exist; there is nothing to own otherwise.

    Raises:
        RunError: Another process is writing into it, or it cannot be written.
    """
    if not new and not directory.path.is_dir():
        yield
        return
    with ExitStack() as stack:
        try:
            mine = stack.enter_context(exclusive(directory.lock))
        except OSError as error:
            raise RunError(
                f"{directory.path}: cannot be written ({error.strerror}); expected a directory for "
                "the results; choose another one with --out"
            ) from error
        if not mine:
            raise RunError(
                f"{directory.path}: another process is training into it; wait until that run ends, "
                "or choose another directory with --out"
            )
        yield
