"""The command line `tdlrt`."""

import io
import sys

from tdlrt_lab.cli.interrupts import STOPPED, interrupts_end_the_process

__all__ = ["main"]


def main() -> None:
    """Run the command line on `sys.argv` and exit.

    The exit code is 0 for success, 1 for a failed run, 2 for bad arguments, and 130 if Ctrl-C
    stopped the command at once, which also works while torch is being imported.
    """
    for stream in (sys.stdout, sys.stderr):  # the locale may lack letters of what is printed
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with interrupts_end_the_process():
        from tdlrt_lab.cli.app import run_app

    try:
        code = run_app(sys.argv[1:])
    except KeyboardInterrupt:
        code = STOPPED
    sys.exit(code)
