"""`tdlrt compare`: a sweep of runs, described by a file or by options."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from tdlrt.errors import RunError
from tdlrt_lab.cli.display import SweepDisplay
from tdlrt_lab.cli.output import OUTPUT, Debug, shown_option
from tdlrt_lab.cli.screens import choose_screen
from tdlrt_lab.config import RunConfig
from tdlrt_lab.methods import METHODS
from tdlrt_lab.names import pick
from tdlrt_lab.sweep.checks import check_data, check_directories, describe
from tdlrt_lab.sweep.execute import execute
from tdlrt_lab.sweep.plan import Sweep, SweepError, SweepRun, read_sweep
from tdlrt_lab.sweep.ray_engine import execute_on_ray

__all__ = ["compare"]

SWEEP = "Sweep"
FILE_ENDINGS = (".yaml", ".yml")

Settings = dict[str, dict[str, Any]]
"""Options by method, as given with --set; those of all methods under ''."""


def compare(
    sweep: Annotated[
        str, typer.Argument(metavar="SWEEP.yaml|MODEL", help="Sweep file or network.")
    ],
    data: Annotated[str | None, shown_option("Data set of MODEL.", SWEEP)] = None,
    data_dir: Annotated[
        str | None,
        shown_option(
            "Folder with the data, as for train.", SWEEP, show_default="the file's, or the hub"
        ),
    ] = None,
    methods: Annotated[
        str | None,
        shown_option(
            "Methods for MODEL, such as dense,tdlrt.", SWEEP, show_default=RunConfig.method
        ),
    ] = None,
    tau: Annotated[
        str | None,
        shown_option("Tolerances of the methods that have one, such as 0.05,0.1.", SWEEP),
    ] = None,
    budget: Annotated[
        str | None,
        shown_option("Budgets of the methods that have one, such as 0.05,0.1.", SWEEP),
    ] = None,
    values: Annotated[
        list[str] | None,
        shown_option(
            "Value of an option of train, for all methods or one: epochs=3, tucker.rank=0.1,0.2. "
            "Several values make several rows. Can be repeated.",
            SWEEP,
            "--set",
            metavar="[METHOD.]OPTION=VALUES",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        shown_option("Seeds, such as 0,1,2.", SWEEP, show_default="the file's, or 0"),
    ] = None,
    jobs: Annotated[
        int | None,
        shown_option(
            "Number of parallel runs; with --ray, on each machine.",
            SWEEP,
            min=1,
            show_default="one, or one per device",
        ),
    ] = None,
    devices: Annotated[
        str | None,
        shown_option("Devices to distribute the runs over, such as cuda:0,cuda:1.", SWEEP),
    ] = None,
    ray: Annotated[
        str | None,
        shown_option(
            "Run on the machines of a Ray cluster, which must share OUT: auto, HOST:PORT or "
            "ray://HOST:PORT; local starts a cluster on this machine.",
            SWEEP,
            metavar="local|ADDRESS",
        ),
    ] = None,
    out: Annotated[
        str | None, shown_option("Directory of the sweep.", OUTPUT, show_default="runs/NAME")
    ] = None,
    as_json: Annotated[
        bool, shown_option("Print one JSON object per event.", OUTPUT, "--json")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train all combinations of methods, sizes and seeds.

    All options are checked before the first run starts. Each run has a run
    directory OUT/ROW/seedN. A repeated call skips finished runs and continues
    interrupted ones; a failed run does not stop the others. Several calls with
    the same OUT share the work. tdlrt report OUT shows the results.
    """
    if ray is not None and devices is not None:
        raise SweepError(
            f"--devices {devices} and --ray: expected one of them; Ray assigns the GPUs"
        )
    settings = _parse_settings(values or [])
    shared = settings[""] | ({} if data_dir is None else {"data_dir": data_dir})
    if sweep.endswith(FILE_ENDINGS):
        model_only = {"--data": data, "--methods": methods, "--tau": tau, "--budget": budget}
        _check_file_options(sweep, settings, model_only)
        overrides = shared | ({} if seeds is None else {"seeds": _parse_seeds(seeds)})
        found, name = read_sweep(sweep, overrides), Path(sweep).stem
    else:
        sizes = {"tau": tau, "budget": budget}
        names = (methods or RunConfig.method).split(",")
        rows = _method_rows(names, sizes, settings)
        found, name = _make_sweep(sweep, data, rows, shared, seeds), f"{sweep}-{data}"
    used_devices = devices.split(",") if devices else []
    directory = Path(out or f"runs/{name}")
    runs = found.runs(directory)
    _check_used(settings, found, runs)
    check_directories(runs)
    check_data(runs)
    describe(found, directory)
    with choose_screen(as_json=as_json) as screen:
        display = SweepDisplay(screen, runs)
        if ray is not None:
            execute_on_ray(runs, display.show, ray, jobs=jobs)
        else:
            jobs = jobs or max(1, len(used_devices))
            execute(runs, display.show, jobs=jobs, devices=used_devices)
        display.close(f"results in {directory}; tables and figures: tdlrt report {directory}")
    if failed := display.failed:
        raise RunError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


def _parse_settings(words: Sequence[str]) -> Settings:
    found: Settings = {"": {}}
    for word in words:
        target, equals, text = word.partition("=")
        method, _, option = target.rpartition(".")
        if not equals or not option or not text:
            raise SweepError(f"--set {word}: expected OPTION=VALUES or METHOD.OPTION=VALUES")
        found.setdefault(method, {})[option] = _parse_values(text)
    return found


def _parse_values(text: str) -> Any:
    """One value, or a list if there are several, as YAML reads them."""
    values = [yaml.safe_load(word) for word in text.split(",")]
    return values if len(values) > 1 else values[0]


def _parse_seeds(text: str) -> tuple[int, ...]:
    seeds = text.split(",")
    if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
        raise SweepError(f"--seeds {text}: expected different integers such as 0,1,2")
    return tuple(map(int, seeds))


def _check_file_options(
    path: str, settings: Settings, model_only: Mapping[str, str | None]
) -> None:
    """Refuse options that do not apply to a sweep from a file."""
    for name, value in model_only.items():
        if value is not None:
            raise SweepError(f"{name} {value}: expected only with a model; {path} lists its rows")
    for method in settings:
        if method:
            raise SweepError(f"--set {method}.: expected an option of all rows with {path}")


def _method_rows(
    methods: Sequence[str], sizes: Mapping[str, str | None], settings: Settings
) -> dict[str, dict[str, Any]]:
    """One row per method, or one for tau and one for budget if the method takes both."""
    for method in settings:
        if method and method not in methods:
            raise SweepError(f"--set {method}.: expected one of the methods {', '.join(methods)}")
    given = {size: _parse_values(text) for size, text in sizes.items() if text}
    for size in given:
        if not any(size in pick("method", name, METHODS).options for name in methods):
            raise SweepError(f"--{size} {sizes[size]}: not used with {', '.join(methods)}")
        for method, options in settings.items():
            if size in options:
                target = _target(method, size)
                raise SweepError(f"--set {target} and --{size}: expected one of them")
    rows: dict[str, dict[str, Any]] = {}
    for name in methods:
        row = {"method": name, **settings.get(name, {})}
        taken = [size for size in given if size in METHODS[name].options]
        for size in taken:
            rows[f"{name}-{size}" if len(taken) > 1 else name] = {**row, size: given[size]}
        if not taken:
            rows[name] = row
    return rows


def _make_sweep(
    model: str,
    data: str | None,
    rows: Mapping[str, dict[str, Any]],
    shared: Mapping[str, Any],
    seeds: str | None,
) -> Sweep:
    if data is None:
        raise SweepError("--data: missing; expected the name of a data set with a model")
    return Sweep(
        options={"model": model, "data": data, **shared},
        rows=rows,
        seeds=_parse_seeds(seeds) if seeds else (0,),
        title=f"{model} on {data}",
        source="the command line",
    )


def _check_used(settings: Settings, sweep: Sweep, runs: Sequence[SweepRun]) -> None:
    """Refuse options of --set that have no effect on any run.

    A configuration alone accepts an unused option at its default, and a dense one accepts every
    option of compression, because the rows of a sweep share options.
    """
    for method, options in settings.items():
        configs = [run.config for run in runs if method in ("", run.config.method)]
        for option in options:
            target = _target(method, option)
            if not method and all(option in row for row in sweep.rows.values()):
                raise SweepError(f"--set {target}: every row sets its own {option}; leave it out")
            if not any(config.used(option) for config in configs):
                users = f"method {method}" if method else "any row"
                raise SweepError(f"--set {target}: not used by {users}; leave it out")


def _target(method: str, option: str) -> str:
    return f"{method}.{option}" if method else option
