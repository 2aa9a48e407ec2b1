"""`tdlrt compare`: a sweep from a file or from options, and what is shown of it meanwhile."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from tdlrt.errors import RunError
from tdlrt_lab.cli.display import SweepDisplay
from tdlrt_lab.cli.screens import choose_screen
from tdlrt_lab.config import RunConfig
from tdlrt_lab.methods import METHODS
from tdlrt_lab.names import pick
from tdlrt_lab.sweep.checks import check_data, check_directories, describe
from tdlrt_lab.sweep.execute import execute
from tdlrt_lab.sweep.plan import Sweep, SweepError, read_sweep
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
    with choose_screen(as_json=as_json) as screen:
        display = SweepDisplay(screen, runs)
        if ray is not None:
            execute_on_ray(runs, display.show, ray, jobs=jobs)
        else:
            execute(runs, display.show, jobs=jobs or max(1, len(places)), devices=places)
        display.close(f"results in {directory}; tables and pictures: tdlrt report {directory}")
    if failed := display.failed:
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
