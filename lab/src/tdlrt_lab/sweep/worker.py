"""A process that does one run of a sweep: reads the run from stdin, writes events to stdout.

python -m tdlrt_lab.sweep.worker < RUN.json

The events are JSON lines. Between them a thread writes that this process is alive. If the process
that started the sweep has ended, this one stores a checkpoint and ends, too.
"""

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from tdlrt_lab.config import RunConfig
from tdlrt_lab.run.liveness import SECONDS_BETWEEN_SIGNS
from tdlrt_lab.run.runner import Interrupted
from tdlrt_lab.sweep.attempts import ALIVE, Emit, Event, work
from tdlrt_lab.sweep.plan import SweepRun

__all__ = ["main"]


def main() -> None:
    """Do the run. All other output goes to stderr."""
    events, writing = os.fdopen(os.dup(1), "w"), threading.Lock()
    os.dup2(2, 1)

    def emit(event: Event) -> None:
        try:
            with writing:
                print(json.dumps(event), file=events, flush=True)
        except BrokenPipeError:
            raise Interrupted("the process that started the sweep has ended") from None

    threading.Thread(target=_show_life, args=(emit,), daemon=True).start()
    given = json.load(sys.stdin)
    config = RunConfig(**given["config"])
    try:
        work([SweepRun(row=given["row"], config=config, out=Path(given["out"]))], emit)
    except Interrupted as error:
        sys.exit(str(error))


def _show_life(emit: Emit) -> None:
    with suppress(Interrupted):
        while True:
            emit(ALIVE)
            time.sleep(SECONDS_BETWEEN_SIGNS)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
