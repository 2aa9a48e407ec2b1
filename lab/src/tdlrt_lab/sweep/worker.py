"""A process that does one run of a sweep: reads the run from stdin, writes events to stdout.

python -m tdlrt_lab.sweep.worker < RUN.json

The events are JSON lines.
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
    """Do the run. All other output goes to stderr."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def emit(event: Event) -> None:
        try:
            print(json.dumps(event), file=events, flush=True)
        except BrokenPipeError:
            raise Interrupted("the process that started the sweep has ended") from None

    given = json.load(sys.stdin)
    config = RunConfig(**given["config"])
    try:
        work([SweepRun(row=given["row"], config=config, out=Path(given["out"]))], emit)
    except Interrupted as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
