"""Processes that no longer answer, and processes whose launcher has ended."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

__all__ = ["SECONDS_BETWEEN_SIGNS", "SECONDS_OF_SILENCE", "Silence", "companions_watched"]

SECONDS_BETWEEN_SIGNS = 5.0
SECONDS_OF_SILENCE = 60.0
"""Signs of life come from a thread of their own, so a long step is no silence."""

SECONDS_TO_STOP = 60.0
"""Time to store a checkpoint once the launcher has ended."""


class Silence:
    """Which processes have given no sign of life for too long.

    Time in which this process itself did not run counts for none: it heard nobody then.

    Args:
        limit: Seconds.
        clock: Time in seconds.
    """

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._heard: dict[Hashable, float] = {}
        self._asked = clock()

    def heard(self, process: Hashable) -> None:
        """Note a sign of life; from the first one on the process is waited for."""
        self._heard[process] = self._clock()

    def forget(self, process: Hashable) -> None:
        """Wait for a process no longer."""
        self._heard.pop(process, None)

    def silent(self) -> list[Hashable]:
        """The processes that are silent; ask more often than four times within the limit."""
        now, before = self._clock(), self._asked
        self._asked = now
        if now - before > self._limit / 4:
            self._heard = dict.fromkeys(list(self._heard), now)
        return [one for one, heard in list(self._heard.items()) if now - heard > self._limit]


@contextmanager
def companions_watched() -> Iterator[None]:
    """Watch the launcher and the other processes of a run from a thread, within a `with` block.

    If the launcher has ended, this process gets a termination signal, on which it stores a
    checkpoint. If another process has been silent for a minute, stopped for example, this one ends
    at once with a message: it may be waiting for the other one in the middle of a step.

    The process group must have been initialised from the environment of torchrun.
    """
    end = threading.Event()
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=SECONDS_OF_SILENCE),
    )
    own = _key(dist.get_rank())
    arguments = store, dist.get_rank(), dist.get_world_size(), os.getppid(), end
    thread = threading.Thread(target=_watch, args=arguments, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        with suppress(RuntimeError):  # the launcher may have ended
            store.add(own, -store.add(own, 0))  # nobody waits for a process without signs


def _watch(store: TCPStore, number: int, count: int, launcher: int, end: threading.Event) -> None:
    silence = Silence(SECONDS_OF_SILENCE)
    signs = {process: 0 for process in range(count) if process != number}
    while not end.wait(SECONDS_BETWEEN_SIGNS):
        if os.getppid() != launcher:
            _stop("torchrun has ended", end)
            return
        try:
            store.add(_key(number), 1)
            for process, before in signs.items():
                signs[process] = store.add(_key(process), 0)  # reads it
                if not signs[process]:  # it has not begun yet, or has left
                    silence.forget(process)
                elif signs[process] != before:
                    silence.heard(process)
        except RuntimeError as error:  # on a machine other than that of the store
            _stop(f"torchrun does not answer ({error})", end)
            return
        for silent in silence.silent():
            _say(
                f"process {silent} of {count} has given no sign of life for "
                f"{SECONDS_OF_SILENCE:g} seconds: it is stopped, or its machine hangs; continue "
                "from the last checkpoint with --resume"
            )
            os._exit(1)


def _stop(reason: str, end: threading.Event) -> None:
    """Let this process store a checkpoint and end; end it at once if it takes too long."""
    _say(f"{reason}: this process stops, too; continue with --resume")
    os.kill(os.getpid(), signal.SIGTERM)
    if not end.wait(SECONDS_TO_STOP):
        os._exit(1)


def _say(message: str) -> None:
    with suppress(OSError):  # the terminal may have gone with the launcher
        print(f"error: process {os.getpid()}: {message}", file=sys.stderr, flush=True)


def _key(process: int) -> str:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"tdlrt/attempt {attempt}/signs of life of {process}"
