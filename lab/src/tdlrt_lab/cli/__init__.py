"""The command line `tdlrt`."""

import io
import os
import signal
import sys

__all__ = ["main"]

STOPPED = 130


def main() -> None:
    """Run the command line on `sys.argv` and exit.

    The exit code is 0 for success, 1 for a failed run, 2 for bad arguments, and 130 if Ctrl-C
    stopped the command at once, which also works while torch is being imported.
    """
    ordinary = signal.getsignal(signal.SIGINT)
    if ordinary is signal.default_int_handler:  # a shell may start a job that ignores the signal
        # KeyboardInterrupt could be swallowed by a module that is being imported.
        signal.signal(signal.SIGINT, lambda *_: os._exit(STOPPED))
    for stream in (sys.stdout, sys.stderr):  # the locale may lack letters of what is printed
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    from tdlrt_lab.cli.app import run_app

    signal.signal(signal.SIGINT, ordinary)
    try:
        code = run_app(sys.argv[1:])
    except KeyboardInterrupt:
        code = STOPPED
    sys.exit(code)
