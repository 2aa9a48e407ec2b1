"""`tdlrt compare`: a sweep from a file or from options, and what is shown of it meanwhile."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from tdlrt.errors import RunError
from tdlrt_lab.config import RunConfig
from tdlrt_lab.methods import METHODS
from tdlrt_lab.names import pick
from tdlrt_lab.spread import format_spread
from tdlrt_lab.sweep.execute import Event, execute
from tdlrt_lab.sweep.plan import (
    Sweep,
    SweepError,
    SweepRun,
    check_data,
    check_directories,
    describe,
    read_sweep,
)
from tdlrt_lab.sweep.ray_engine import execute_on_ray

__all__ = ["compare"]

SWEEP, OUTPUT = "Sweep", "Output"
FILE_ENDINGS = (".yaml", ".yml")


def _option(help: str, panel: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


def compare(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP.yaml|MODEL", help="File, or network.")],
    data: Annotated[str | None, _option("Data set, beside MODEL.", SWEEP)] = None,
    data_dir: Annotated[
        str | None, _option("As for train.", SWEEP, show_default="the file's, or the hub")
    ] = None,
    methods: Annotated[str | None, _option("Methods beside MODEL: dense,tdlrt,...", SWEEP)] = None,
    tau: Annotated[str | None, _option("For methods with a tolerance: 0.05,0.1", SWEEP)] = None,
    budget: Annotated[str | None, _option("For methods with a budget: 0.05,0.1", SWEEP)] = None,
    values: Annotated[
        list[str] | None,
        _option(
            "Any option of train, for all methods or one: epochs=3, tucker.rank=0.1,0.2. "
            "Several values make several rows. May be repeated.",
            SWEEP,
            "--set",
            metavar="[METHOD.]OPTION=VALUES",
        ),
    ] = None,
    seeds: Annotated[str | None, _option("0,1,2", SWEEP, show_default="the file's, or 0")] = None,
    jobs: Annotated[
        int | None,
        _option(
            "Runs at a time; with --ray, on each machine.",
            SWEEP,
            min=1,
            show_default="one, or one per device",
        ),
    ] = None,
    devices: Annotated[
        str | None, _option("Devices that the runs take in turn: cuda:0,cuda:1", SWEEP)
    ] = None,
    ray: Annotated[
        str | None,
        _option(
            "Do the runs on the machines of a Ray cluster, which must share OUT: auto, HOST:PORT "
            "or ray://HOST:PORT; local starts one here.",
            SWEEP,
            metavar="local|ADDRESS",
        ),
    ] = None,
    out: Annotated[
        str | None, _option("Directory of the sweep.", OUTPUT, show_default="runs/NAME")
    ] = None,
    as_json: Annotated[bool, _option("Print one JSON object per event.", OUTPUT, "--json")] = False,
    debug: Annotated[bool, _option("Show the traceback of an error.", OUTPUT, "--debug")] = False,
) -> None:
    """Train methods x sizes x seeds, and go on where an earlier call stopped.

    Everything is checked before the first run starts. Each run has a directory
    OUT/ROW/seedN as train writes it; finished ones are skipped, interrupted ones
    continue, and a run that fails does not stop the others. Several calls with
    the same OUT share the work. tdlrt report OUT shows the results.
    """
    if ray is not None and devices is not None:
        raise SweepError(f"--devices {devices} beside --ray: Ray hands out the GPUs; drop one")
    shared = _settings(values or [])
    if data_dir is not None:
        shared[""]["data_dir"] = data_dir
    if sweep.endswith(FILE_ENDINGS):
        beside = {"--data": data, "--methods": methods, "--tau": tau, "--budget": budget}
        found, name = _from_file(sweep, shared, seeds, beside), Path(sweep).stem
    else:
        sizes = {"tau": tau, "budget": budget}
        found, name = _from_options(sweep, data, methods, sizes, shared, seeds), f"{sweep}-{data}"
    places = devices.split(",") if devices else []
    directory = Path(out or f"runs/{name}")
    runs = found.runs(directory)
    check_directories(runs)
    check_data(runs)
    describe(found, directory)
    with nullcontext(JsonDisplay(runs)) if as_json else display_on(Console(), runs) as display:
        if ray is not None:
            execute_on_ray(runs, display.show, ray, jobs=jobs)
        else:
            execute(runs, display.show, jobs=jobs or max(1, len(places)), devices=places)
        display.close()
    failed = [event["run"] for event in display.last.values() if event["event"] == "failed"]
    if failed:
        raise RunError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


def _settings(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options of --set by method; those of all methods under ''."""
    found: dict[str, dict[str, Any]] = {"": {}}
    for word in words:
        target, equals, text = word.partition("=")
        method, _, option = target.rpartition(".")
        if not equals or not option or not text:
            raise SweepError(f"--set {word}: expected OPTION=VALUES or METHOD.OPTION=VALUES")
        found.setdefault(method, {})[option] = _values(text)
    return found


def _values(text: str) -> Any:
    """One value, or the list of several, as YAML reads them."""
    values = [yaml.safe_load(word) for word in text.split(",")]
    return values if len(values) > 1 else values[0]


def _seeds(text: str) -> tuple[int, ...]:
    seeds = text.split(",")
    if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
        raise SweepError(f"--seeds {text}: expected different integers such as 0,1,2")
    return tuple(map(int, seeds))


def _from_file(
    path: str, settings: Mapping[str, Any], seeds: str | None, beside: Mapping[str, str | None]
) -> Sweep:
    for name, value in beside.items():
        if value is not None:
            raise SweepError(f"{name} {value}: expected beside a model; {path} states its own rows")
    methods = [method for method in settings if method]
    if methods:
        raise SweepError(f"--set {methods[0]}.: expected an option of all rows beside {path}")
    overrides = dict(settings[""])
    if seeds is not None:
        overrides["seeds"] = _seeds(seeds)
    return read_sweep(path, overrides)


def _from_options(
    model: str,
    data: str | None,
    methods: str | None,
    sizes: Mapping[str, str | None],
    settings: Mapping[str, dict[str, Any]],
    seeds: str | None,
) -> Sweep:
    """One row per method; tolerances and budgets go to the methods that take them."""
    if data is None:
        raise SweepError("--data: missing beside a model; expected the name of a data set")
    names = (methods or RunConfig.method).split(",")
    for method in settings:
        if method and method not in names:
            raise SweepError(f"--set {method}.: expected one of the methods {', '.join(names)}")
    given = {size: _values(text) for size, text in sizes.items() if text}
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        own = {"method": name, **settings.get(name, {})}
        taken = [size for size in given if size in pick("method", name, METHODS).options]
        for size in taken:
            rows[f"{name}-{size}" if len(taken) > 1 else name] = {**own, size: given[size]}
        if not taken:
            rows[name] = own
    return Sweep(
        options={"model": model, "data": data, **settings[""]},
        rows=rows,
        seeds=_seeds(seeds) if seeds else (0,),
        title=f"{model} on {data}",
        source="options",
    )


class Display:
    """What became of each run; shows nothing by itself."""

    def __init__(self, runs: Sequence[SweepRun]) -> None:
        self.runs = runs
        self.last: dict[str, Event] = {}

    def show(self, event: Event) -> None:
        """Take note of an event."""
        self.last[event["run"]] = event

    def close(self) -> None:
        """Every run was tried."""


class JsonDisplay(Display):
    """One JSON object per event, and one at the end."""

    def show(self, event: Event) -> None:
        """Print it."""
        super().show(event)
        print(json.dumps(event), flush=True)

    def close(self) -> None:
        """Say how many runs ended how."""
        ends = [event["event"] for event in self.last.values()]
        counts = {end: ends.count(end) for end in ("finished", "failed", "busy")}
        print(json.dumps({"event": "sweep", "runs": len(self.runs), **counts}), flush=True)


class LineDisplay(Display):
    """A line per start and end of a run, and the table at the end."""

    def __init__(self, runs: Sequence[SweepRun], console: Console) -> None:
        super().__init__(runs)
        self.console = console

    def show(self, event: Event) -> None:
        """Print a line, save for single epochs."""
        super().show(event)
        if event["event"] != "epoch":
            number = 1 + [run.name for run in self.runs].index(event["run"])
            line = f"[{number}/{len(self.runs)}] {event['run']}: {_sentence(event)}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Print the table."""
        self.console.print(table(self.runs, self.last))
        self.console.print(
            f"results in {self.runs[0].out}; tables and pictures: tdlrt report {self.runs[0].out}",
            highlight=False,
            soft_wrap=True,
        )


class LiveDisplay(LineDisplay):
    """The table, kept up to date; lines for what failed."""

    def __init__(self, runs: Sequence[SweepRun], console: Console, live: Live) -> None:
        super().__init__(runs, console)
        self._live = live
        self._live.update(table(self.runs, self.last), refresh=True)

    def show(self, event: Event) -> None:
        """Redraw the table."""
        if event["event"] == "failed":
            super().show(event)
        Display.show(self, event)
        self._live.update(table(self.runs, self.last), refresh=True)

    def close(self) -> None:
        """Print the table for good."""
        self._live.stop()
        super().close()


@contextmanager
def display_on(console: Console, runs: Sequence[SweepRun]) -> Iterator[LineDisplay]:
    """A live table on a terminal, lines elsewhere; leaves the terminal as it was."""
    if console.is_terminal:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            yield LiveDisplay(runs, console, live)
    else:
        yield LineDisplay(runs, console)


def _sentence(event: Event) -> str:
    kind = event["event"]
    if kind == "finished":
        return (
            f"accuracy {event['accuracy']:.2f} %, compression {100 * event['compression']:.1f} %, "
            f"{event['seconds']:.1f} s"
        )
    if kind == "started":
        return f"continues after epoch {event['epoch']}" if event["epoch"] else "started"
    return f"failed: {event['error']}" if kind == "failed" else "another process is at it"


def table(runs: Sequence[SweepRun], last: Mapping[str, Event]) -> Table:
    """One line per row of the sweep: how far its runs are, and what came out."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    shown.add_column("row", overflow="fold")
    shown.add_column("state")
    for name in ("accuracy (%)", "compression (%)", "seconds"):
        shown.add_column(name, justify="right", no_wrap=True)
    rows: dict[str, list[Event | None]] = {}
    for run in runs:
        rows.setdefault(run.row, []).append(last.get(run.name))
    for row, events in rows.items():
        done = [event for event in events if event and event["event"] == "finished"]
        numbers = [
            format_spread([event["accuracy"] for event in done], 2),
            format_spread([100 * event["compression"] for event in done], 1),
            format_spread([event["seconds"] for event in done], 1),
        ]
        shown.add_row(row, _state(events), *numbers)
    return shown


def _state(events: Sequence[Event | None]) -> str:
    """How many of a row's runs are done, and what the others do."""
    kinds = [event["event"] if event else "waiting" for event in events]
    words = [f"{kinds.count('finished')}/{len(events)} done"]
    for event in events:
        if event and event["event"] in ("started", "epoch"):
            words.append(f"epoch {event['epoch']}/{event['epochs']}")
    words += [f"{kinds.count(kind)} {kind}" for kind in ("failed", "busy") if kind in kinds]
    return ", ".join(words)
