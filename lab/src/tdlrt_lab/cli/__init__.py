"""The command line `tdlrt`."""

import sys

from tdlrt_lab.cli.app import run_app

__all__ = ["main"]


def main() -> None:
    """Run the command line on `sys.argv` and exit: 0 done, 1 failed run, 2 bad arguments."""
    sys.exit(run_app(sys.argv[1:]))
