"""A process that does one run of a sweep: the order on stdin, events as JSON lines on stdout.

python -m tdlrt.experiments.sweep.worker < ORDER.json
"""

import json
import os
import sys
from pathlib import Path

from tdlrt.experiments.config import RunConfig
from tdlrt.experiments.runner import Interrupted
from tdlrt.experiments.sweep.execute import Event, work
from tdlrt.experiments.sweep.plan import SweepRun

__all__ = ["main"]


def main() -> None:
    """Do the run; whatever else is printed goes to stderr."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def emit(event: Event) -> None:
        try:
            print(json.dumps(event), file=events, flush=True)
        except BrokenPipeError:
            raise Interrupted("the process that started the sweep is gone") from None

    order = json.loads(sys.stdin.read())
    config = RunConfig(**order["config"])
    try:
        work([SweepRun(row=order["row"], config=config, out=Path(order["out"]))], emit)
    except Interrupted as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
