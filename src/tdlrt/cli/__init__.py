"""The command line `tdlrt`."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line on `sys.argv` and exit: 0 done, 1 failed run, 2 bad arguments."""
    try:
        from tdlrt.cli.app import run_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "tdlrt":
            raise
        sys.exit(
            f"error: the command line needs the package {error.name}, which is not installed; "
            "run: pip install 'tdlrt[cli]'"
        )
    sys.exit(run_app(sys.argv[1:]))
