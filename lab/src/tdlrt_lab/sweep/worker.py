"""A process that does one run of a sweep: the order on stdin, events as JSON lines on stdout.

python -m tdlrt_lab.sweep.worker < ORDER.json
"""

import json
import os
import sys
from pathlib import Path

from tdlrt_lab.config import RunConfig
from tdlrt_lab.run.runner import Interrupted
from tdlrt_lab.sweep.execute import Event, work
from tdlrt_lab.sweep.plan import SweepRun

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
