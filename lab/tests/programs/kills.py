"""Kill a training run 200 times: does it end where the run that was left alone ends?

    python lab/tests/programs/kills.py

Each start is a process of its own, forked once the package is imported, so that the instants of
`kill -9` fall into reading the data, training and writing. Every damaged checkpoint would be an
error. Writes benchmarks/results/kills.json.
"""

import argparse
import json
import os
import random
import shlex
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tdlrt.files import write_atomically
from tdlrt_lab.config import RunConfig
from tdlrt_lab.run.checkpoint import Checkpoints
from tdlrt_lab.run.environment import machine, versions
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.run.runner import Observer, run

ROOT = Path(__file__).parents[3]
RESULT = ROOT / "benchmarks/results/kills.json"
CONFIG = RunConfig(
    model="lenet5",
    data="digits",
    device="cpu",
    epochs=100,
    tau=0.2,
    init_scale=1.0,
    augment="standard",
    warmup=0.1,
)
CHECKPOINTS = Checkpoints(steps=3, minutes=0.005, keep=3)
START_SECONDS = 0.05
"""About as long a process reads data and checkpoint before its first step."""


class Strict(Observer):
    """Nothing may be lost."""

    def warned(self, message: str) -> None:
        """Fail."""
        raise AssertionError(message)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=CONFIG.epochs)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = replace(CONFIG, epochs=arguments.epochs)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(config, Path(folder), arguments.kills, arguments.seed)
    result = {
        "command": shlex.join(["python", "lab/tests/programs/kills.py", *sys.argv[1:]]),
        "seed": arguments.seed,
        **found,
        "versions": versions(),
        "machine": machine(torch.device("cpu")),
        "checkpoints": asdict(CHECKPOINTS),
        "config": config.to_dict(),
    }
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(arguments.out, lambda file: file.write(text.encode()))
    print(text, end="")


def compare(config: RunConfig, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Do a run twice, undisturbed and killed so many times, and compare what is left of them."""
    whole, killed = RunDirectory(folder / "whole"), RunDirectory(folder / "killed")
    training_seconds = run(config, whole.path)["seconds"]
    instants = random.Random(seed)
    resumed, states = 0, set()
    for number in range(kills):
        resumed += killed.checkpoint.exists()
        # On average what is left is shared evenly by the kills that are left, and one more.
        left = training_seconds * (1 - epochs(killed) / config.epochs)
        longest = START_SECONDS + 2 * left / (kills - number + 1)
        process = start(config, killed)
        time.sleep(instants.uniform(0, longest))
        os.kill(process, signal.SIGKILL)
        if code(process) != -signal.SIGKILL:
            raise AssertionError(f"before kill {number + 1} the run was over or had failed")
        states.add(contents(killed.checkpoint))
    last = epochs(killed)
    resumed += killed.checkpoint.exists()
    if code(start(config, killed)) != 0:
        raise AssertionError("the run failed after the last kill")
    return {
        "kills": kills,
        "starts_from_a_checkpoint": resumed,
        "distinct_checkpoints": len(states - {None}),
        "epochs_at_the_last_kill": last,
        "metrics_equal": metrics(killed) == metrics(whole),
        "weights_equal": contents(killed.model) == contents(whole.model),
        "summary_equal": summary(killed) == summary(whole),
    }


def start(config: RunConfig, directory: RunDirectory) -> int:
    """Begin or continue the run in a process of its own."""
    process = os.fork()
    if process:
        return process
    try:
        resume = directory.config.exists()
        run(config, directory.path, resume=resume, checkpoints=CHECKPOINTS, observer=Strict())
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def code(process: int) -> int:
    """Wait for its end; negative numbers are signals."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def epochs(directory: RunDirectory) -> int:
    """How many the last checkpoint has behind it."""
    if not directory.checkpoint.exists():
        return 0
    return int(torch.load(directory.checkpoint, weights_only=True)["epoch"])


def contents(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def metrics(directory: RunDirectory) -> list[dict[str, Any]]:
    """All but durations."""
    return [{**asdict(line), "seconds": None} for line in directory.read_metrics()]


def summary(directory: RunDirectory) -> dict[str, Any]:
    """All but the duration."""
    return {**directory.read_summary(), "seconds": None}


if __name__ == "__main__":
    main()
