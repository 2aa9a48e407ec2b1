"""Ctrl-C while modules are imported."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["STOPPED", "interrupts_end_the_process"]

STOPPED = 130
"""Exit code if Ctrl-C stopped the command at once."""


@contextmanager
def interrupts_end_the_process() -> Iterator[None]:
    """End the process at once on Ctrl-C: a module could swallow a KeyboardInterrupt."""
    ordinary = signal.getsignal(signal.SIGINT)
    if ordinary is signal.default_int_handler:  # a shell may start a job that ignores the signal
        signal.signal(signal.SIGINT, lambda *_: os._exit(STOPPED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, ordinary)
