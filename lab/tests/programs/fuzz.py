"""Files that are nearly right, or made to harm: does every loader refuse them as it should?

    nice python lab/tests/programs/fuzz.py

Each loader reads thousands of files with something changed (`mutations.py`, `loaders.py`) in a
process of its own, in little memory. It has to read the file, or to raise an error of tdlrt, within
seconds of the processor, without writing anywhere else; a model must be as before. Input `index` of
a loader depends on the seed alone: `--loader NAME --first INDEX --inputs 1` does it again and shows
the traceback.
Writes benchmarks/results/fuzz.json and the table in docs/robust-input.md.
"""

import argparse
import collections
import json
import os
import random
import resource
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kinds import CONTENTS, PLACES
from loaders import LOADERS, Loader

from tdlrt.errors import TdlrtError
from tdlrt.files import write_atomically
from tdlrt_lab.documents import fill_section
from tdlrt_lab.run.environment import machine, versions

ROOT = Path(__file__).parents[3]
RESULT = ROOT / "benchmarks/results/fuzz.json"
DOCUMENT = ROOT / "docs/robust-input.md"
INPUTS = {
    "model": 20_000,
    "plain": 15_000,
    "imagefolder": 15_000,
    "metrics": 15_000,
    "summary": 10_000,
    "results": 8_000,
    "data": 6_000,
    "failure": 5_000,
    "description": 2_000,
    "sweep": 2_500,
    "config": 1_000,
    "parquet": 500,
    "checkpoint": 300,
}
SECONDS = 5
"""Of the processor, so that the result does not depend on what else the machine does."""

WAIT = 60
"""Seconds by the clock, for a loader that waits and does not compute."""

MEMORY = 2**28
"""Bytes of address space that a loader may take beyond what it has after the first file."""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate")
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")


class HangError(BaseException):
    """A file took too long."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loader", choices=LOADERS, help="only this one, in this process")
    parser.add_argument("--first", type=int, default=0, help="index of the first input")
    parser.add_argument("--inputs", type=int, help="how many of each loader")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.loader:
        count = arguments.inputs or INPUTS[arguments.loader]
        work(arguments.loader, arguments.seed, arguments.first, arguments.first + count)
        return
    rows = []
    for name, count in INPUTS.items():
        rows.append(supervise(name, arguments.seed, arguments.inputs or count))
        print(rows[-1], flush=True)
    store(rows, arguments.seed)


def store(rows: list[dict[str, Any]], seed: int) -> None:
    """Write the result file, and the table in the document."""
    result = {
        "command": shlex.join(["python", "lab/tests/programs/fuzz.py", *sys.argv[1:]]),
        "seed": seed,
        "versions": versions(),
        "machine": machine(torch.device("cpu")),
        "seconds_allowed": SECONDS,
        "bytes_allowed": MEMORY,
        "inputs": sum(row["inputs"] for row in rows),
        "rows": rows,
    }
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(RESULT, lambda file: file.write(text.encode()))
    fill_section(DOCUMENT, "files by loader", table(result))


def table(result: dict[str, Any]) -> list[str]:
    """Lines of the table in the document."""
    lines = ["| loader | files | read | refused | faults | slowest (ms) | memory (MB) |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in result["rows"]:
        faults = sum(row["faults"].values())
        counts = [
            f"{count:,}" for count in (row["inputs"], row["accepted"], row["refused"], faults)
        ]
        cells = [row["loader"], *counts, f"{row['slowest_ms']:,}", f"{row['peak_mb']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def supervise(name: str, seed: int, count: int) -> dict[str, Any]:
    """Do all inputs of a loader, with a new process whenever one dies or hangs."""
    outcomes: collections.Counter[str] = collections.Counter()
    faults: list[dict[str, Any]] = []
    slowest = peak = 0.0
    done, started = 0, time.perf_counter()
    while done < count:
        command = [sys.executable, __file__, "--loader", name, "--seed", str(seed)]
        command += ["--first", str(done), "--inputs", str(count - done)]
        end = "crash"
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            for line in _lines(process):
                if line is None:
                    end = "hang"
                    process.kill()
                    break
                report = json.loads(line)
                outcomes[report["outcome"]] += 1
                slowest, peak = max(slowest, report["ms"]), max(peak, report["mb"])
                if report["outcome"] not in ("accepted", "refused"):
                    faults.append({"index": done, **report})
                done += 1
        if done < count:
            outcomes[end] += 1
            faults.append({"index": done, "outcome": end, "exit": process.returncode})
            done += 1
    return {
        "loader": name,
        "inputs": count,
        "accepted": outcomes.pop("accepted", 0),
        "refused": outcomes.pop("refused", 0),
        "faults": dict(outcomes),
        "examples": faults[:20],
        "slowest_ms": round(slowest),
        "peak_mb": round(peak),
        "seconds": round(time.perf_counter() - started),
    }


def _lines(process: subprocess.Popen[bytes]) -> Iterator[bytes | None]:
    """Lines as they come; None where none came for far too long."""
    pending, descriptor = b"", process.stdout.fileno()
    while True:
        if not select.select([descriptor], [], [], 5 * WAIT)[0]:
            yield None
            return
        data = os.read(descriptor, 2**16)
        *lines, pending = (pending + data).split(b"\n")
        yield from lines
        if not data:
            return


def work(name: str, seed: int, first: int, stop: int) -> None:
    """Read files in this process, and tell of each what came of it."""
    signal.signal(signal.SIGALRM, hang)
    signal.signal(signal.SIGPROF, hang)
    warnings.simplefilter("ignore")
    torch.manual_seed(seed)  # of the weights in the first files
    with tempfile.TemporaryDirectory() as folder:
        loader, watch = LOADERS[name](Path(folder)), Watch(Path(folder))
        sys.addaudithook(watch.see)
        loader.path.write_bytes(loader.samples[0])
        loader.load()
        _limit_memory()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for index in range(first, stop):
            started = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(WAIT)
            outcome = changed(loader, watch, random.Random(f"{seed}/{name}/{index}"))
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            report = {
                "outcome": outcome,
                "ms": round(1e3 * (time.process_time() - started), 1),
                "mb": round(peak / 1e3),
            }
            print(json.dumps(report), flush=True)


def changed(loader: Loader, watch: "Watch", rng: random.Random) -> str:
    """Let a loader read one file with changes by chance; see `attempt`."""
    loader.path.write_bytes(loader.content(rng))
    return attempt(loader, watch)


def kinds_of(loader: Loader) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """The name of each kind of wrong file, and what puts it where nothing is."""
    sample = loader.samples[0]
    for name, put in PLACES.items():
        yield name, partial(_put, put, sample)
    for name, change in CONTENTS.items():
        yield name, partial(_write, change(sample))
    for name, content in loader.fields():
        yield name, partial(_write, content)


def _put(put: Callable[[Path, bytes], object], sample: bytes, path: Path) -> None:
    put(path, sample)


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def attempt(loader: Loader, watch: "Watch") -> str:
    """Let a loader read its file: "accepted", "refused" or what went wrong."""
    try:
        with watch:
            loader.load()
    except TdlrtError:
        outcome = "refused"
    except HangError:
        outcome = "hang"
    except BaseException as error:
        traceback.print_exc()
        outcome = "memory" if isinstance(error, MemoryError) else type(error).__name__
    else:
        outcome = "accepted"
    return watch.found or outcome


class Watch:
    """Notes what is written outside of a folder, programs that are called, and connections."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found, self._on = str(folder.resolve()) + os.sep, "", False

    def __enter__(self) -> None:
        self.found, self._on = "", True

    def __exit__(self, *_: object) -> None:
        self._on = False

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook of Python."""
        if not self._on:
            return
        writes = event in CHANGES or (event == "open" and (arguments[2] or 0) & WRITES)
        if event in FORBIDDEN or (writes and not self._inside(arguments[0])):
            self.found = f"{event} {arguments[0]!r}"

    def _inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        return os.path.realpath(os.fsdecode(path)).startswith(self.folder)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def hang(*_: object) -> None:
    """End the reading of a file that takes too long."""
    raise HangError


if __name__ == "__main__":
    main()
