"""Lock files between processes; the system releases them when their process ends."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tdlrt.errors import RunError
from tdlrt_lab.run.results import RunDirectory

__all__ = ["exclusive", "sole_owner"]


@contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Hold a lock file; yields whether it was acquired, False if another process holds it."""
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
    """Hold the lock of a run directory, so that no other process writes into it.

    A baseline belongs to the run above it: whoever writes into its directory holds both locks.

    Args:
        directory: The run directory.
        new: Create the directory if it does not exist; without it, nothing is locked then.

    Raises:
        RunError: Another process is writing into it, or it cannot be written.
    """
    if not new and not directory.path.is_dir():
        yield
        return
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
        yield


def _locks(directory: RunDirectory) -> list[Path]:
    above = RunDirectory(directory.path.absolute().parent)
    is_baseline = above.baseline.path == directory.path.absolute() and above.lock.exists()
    return [above.lock, directory.lock] if is_baseline else [directory.lock]
